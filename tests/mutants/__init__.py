"""Bugs that systems of this kind are known to have, each as a switch, and the proof that each is found.

A mutant replaces a function or an attribute of the product for as long as it is on. With it the simulation
plays episodes until a property breaks. `make mutants` does so for all of them and writes the table; a
mutant that no episode finds is a hole in the checks, and an error.
"""
