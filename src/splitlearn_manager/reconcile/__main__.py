"""`python -m splitlearn_manager.reconcile DIRECTORY`: runs the command line."""

from splitlearn_manager.cli import reconcile_main

if __name__ == "__main__":
    reconcile_main()
