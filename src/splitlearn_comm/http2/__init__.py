"""gRPC over HTTP/2 on one thread: a `grpc.Server` whose calls may be answered from any thread.

server       listens, looks at all connections from one thread, and finds each call's handler
polling      that thread, which also runs short work between two looks
connection   what arrives on one connection: frames, and the calls that they begin and carry
stream       one call: its messages, its answer, its end
outgoing     what leaves on it, from any thread
calls        calls that are taken over as their message arrives
handlers     calls that a pool's thread answers, as gRPC for Python does
messages     the messages within a call
headers      the headers of calls and answers
frames       the numbers and layouts of HTTP/2

Sources: RFC 9113 (HTTP/2), RFC 7541 (its headers), and "gRPC over HTTP2" of the gRPC project.
"""
