"""From a directory of YAML files to desired state that can be trusted.

    scanner       what lies in the directory now, and whether that is all of it
    settle        two looks at least settle_s apart that agree
    tracked_file  one file's life: seen, settled, read, changed, gone
    claims        who declares which model: accepted, in conflict, in doubt, missing
    absence       how many may go at once: the prune guard
    acceptance    all files together: what is desired, what is held, what is gone
    weights       the same rule for the files behind model_path
    source        these joined: look(now) → DesiredState
    watcher       wakes the loop up when something may have changed; decides nothing

Scanning is the truth, events are hints. A look costs one listing a directory and one stat a file, and
parses nothing that has not changed. Whatever cannot be seen, read or understood keeps what was good.
"""

from splitlearn_manager.desired.source import DesiredSource
from splitlearn_manager.desired.state import DesiredModel, DesiredState, Source, SourceRef
from splitlearn_manager.desired.watcher import Watcher

__all__ = ["DesiredModel", "DesiredSource", "DesiredState", "Source", "SourceRef", "Watcher"]
