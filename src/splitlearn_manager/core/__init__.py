"""The lifecycle of models on this node: what is loaded, what it holds, who goes when room is short.

Knows neither the directory of YAML files nor gRPC. `lifecycle`, `ledger` and `eviction` are pure:
they import no torch, no threads and no clock. `instances` guards the state with one short lock;
`model_manager` starts the work and waits for it.
"""
