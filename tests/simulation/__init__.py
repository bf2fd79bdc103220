"""The whole loop in one thread from one seed: real decisions, simulated machine, faults everywhere.

    script      what the world does, when: made from a seed, printable, replayable
      │
      ▼
    world ──acts──► machine: file system, clock, work, memory, state files; any effect may fail or crash
      │                 ▲
      └──commands──► node: the real scanner, acceptance, weights, plan, loop, manager, ledger and store
                        │
    oracle, checks ◄────┘ at every step, and once more when all faults are over

Real is everything that decides; simulated is everything that takes time, threads, memory or a disk. A
crash is an exception that goes through the node at an effect (a call of the file system, a write of a
state file, a thread that starts, a load, a close); after it no effect of that node happens any more, and
the next node starts with the same files and nothing loaded.

The oracle knows every byte that was ever in the directory and since when. It states the rules of
acceptance over that history, and shares no code with `desired/acceptance.py` but the parser.

`make simulate` runs many episodes; a failing one prints its seed, and `make simulate SEED=n` the trace.
Speed: some thousands of steps a second; a step is a turn of the loop, a piece of work, or an act of the
world. Parsed files are kept by their bytes, because reading YAML would cost more than all else.
"""
