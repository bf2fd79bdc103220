"""The node on the network: gRPC for requests, HTTP for people and probes."""
