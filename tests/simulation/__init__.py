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

Which property is checked when. A *look* is one of the node at the directory, a *turn* one of the loop, a
*transition* one of an instance; *rest* is when all faults are over and nothing is left to do.

    I1   turn         planned again from the same in another order (checks)
    I2   turn         no turns without time passing; rest: an hour of nothing does nothing (episode)
    I3   turn         no load hangs for ever (checks); rest: reached in time, serves what is desired (episode,
                      rest), and a request brings a parked model back (epilogue)
    I4   rest         with events lost, late, doubled, and none at all at the end, the files are known (rest)
    I5   load         nothing is loaded that a restart brought up and no file declares (checks); rest: nothing
                      in memory twice or unowned, nothing remembered of strangers (rest); what a crash leaves
                      is what the next looks are judged by (oracle)
    I6   turn         nothing desired, suspended or Python's own is unloaded (checks)
    I7   look         no new spec but from one settled, valid, undisputed file (oracle); load: no weights that
                      have not stood still (checks)
    I8   look         nothing goes without proof of its absence (oracle)
    I9   look         nor above the guard, unless just that was confirmed (oracle)
    I10  step         nothing in memory without a reservation; transition: within limits (checks); turn and
                      load: nothing is promised that others have (pressure); load:
                      reserves what loads of that version measured, in an earlier process too (sizes);
                      rest: all is returned (rest)
    I11  transition   under surge somebody serves (checks); turn: recreate only where surge does not fit
                      (admission); rest: after a failed update the old version serves (rest)
    I12  look         a new generation for a new spec only (oracle); turn: no update to what is there
                      (admission); rest: as many actions as causes (checks)
    I13  episode      of a pair, with and without trouble: the same is done to the others (isolation)
    I14  load         not before its time; turn: counters grow with attempts, waits have a cap (retries)
    I15  rest         where the files leave no doubt, they alone decide (rest)
    I16  step         one operation an id, READY is what is routed to; transition: legal edges only (checks)
    I17  turn         what is executed is what was planned, in order (checks); epilogue: a dry run calls and
                      writes nothing, and foretells what is done, and the memory it takes (epilogue)
    I18  turn         Ready is said of the accepted generation (checks); load and rest: what serves was made
                      of the files as they are (checks, rest)
    I19  turn         who goes might go, was next, and was needed (admission; for others: pressure); eviction:
                      idle and unpinned (checks); epilogue: use of what serves swaps nothing (epilogue)
    I20  step         no lease on what is closed (checks, node); close: no lease is left (models);
                      rest: every request has ended (episode)

`make simulate` runs many episodes; a failing one prints its seed, and `make simulate SEED=n` the trace.
Speed: some thousands of steps a second; a step is a turn of the loop, a piece of work, or an act of the
world. Parsed files are kept by their bytes, because reading YAML would cost more than all else.
"""
