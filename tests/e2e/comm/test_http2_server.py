"""The server of the transport: gRPC's own client, and one of HTTP/2, find in it what they expect."""

from __future__ import annotations

import contextlib
import errno
import gc
import gzip
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import grpc
import h2.settings
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitlearn_comm.http2 import connection, frames, listening
from splitlearn_comm.http2.messages import Assembly
from splitlearn_comm.http2.outgoing import Outgoing
from splitlearn_comm.http2.server import Server
from splitlearn_comm.http2.stream import WINDOW, StreamOfCall
from splitlearn_comm.server.pool import BoundedPool
from support.h2_caller import PATIENCE_S, Caller, message
from support.waiting import eventually

LIMIT = 4 * 2**20
MOST_CALLS = 40
TWICE = "/test/Twice"
MANY = "/test/Many"


class Taken:
    """Takes calls over: answers each at once, or keeps it."""

    def __init__(self, pool: BoundedPool) -> None:
        self.experimental_thread_pool = pool
        self.kept: list[tuple[bytes, Any]] = []
        self.keeps = False

    def begin(self, data: Any, call: Any) -> None:
        if self.keeps:
            self.kept.append((bytes(data), call))
        elif bytes(data[:4]) == b"fail":
            raise ValueError("no")
        else:
            call.name_version("v7")
            call.send(data, b"|", memoryview(data))


class Full:
    full = "there is no room"


class Echo:
    """A stream that sends back what comes; reads no further while it is `closed`."""

    def __init__(self) -> None:
        self.wires: list[Any] = []
        self.received_all: list[bytes] = []
        self.closed = False
        self.over = threading.Event()
        self.gone_out = 0

    def open(self, wire: Any) -> Echo:
        self.wires.append(wire)
        return self

    def received(self, frame: Any) -> bool:
        self.received_all.append(bytes(frame))
        self.wires[-1].write(bytes(frame))
        return not self.closed

    def sent(self) -> None:
        self.gone_out += 1

    def no_more(self) -> None:
        self.over.set()
        self.wires[-1].end(grpc.StatusCode.OK, "")


class Lab:
    """A server with a handler of each kind."""

    def __init__(self) -> None:
        self.pool = BoundedPool("test", 8, 8)
        self.taken = Taken(self.pool)
        self.echo = Echo()
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gone = threading.Event()
        self.wanted: list[bytes] = []
        self.notify: Any = None
        self.waiting = 0
        self.server = Server(self.pool, max_message_length=LIMIT, max_calls=MOST_CALLS)
        self.server.add_generic_rpc_handlers((self._handlers(),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{self.port}", options=[("grpc.max_receive_message_length", -1)]
        )

    def _handlers(self) -> grpc.GenericRpcHandler:
        def twice(data: bytes, context: grpc.ServicerContext) -> bytes:
            return data * 2

        def many(data: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
            for number in range(int(data)):
                yield bytes([number % 256]) * 1000

        def joined(requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            return b"".join(requests)

        def each(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            for data in requests:
                self.wanted.append(data)
                yield data[::-1]

        def told(data: bytes, context: grpc.ServicerContext) -> bytes:
            context.send_initial_metadata((("first", "1"),))
            context.set_trailing_metadata((("k", "v"), ("k-bin", b"\x00\xff")))
            left_s = context.time_remaining()
            found = dict(context.invocation_metadata())
            return repr(
                (
                    left_s is not None and 0 < left_s < 30,
                    found["key"],
                    found["key-bin"],
                    context.peer(),
                )
            ).encode()

        def refuses(data: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "50 % of «it»\nis missing")

        def sets(data: bytes, context: grpc.ServicerContext) -> bytes:
            context.set_code(grpc.StatusCode.NOT_FOUND)
            context.set_details("nowhere")
            return b""

        def raises(data: bytes, context: grpc.ServicerContext) -> bytes:
            raise ValueError("secret")

        def waits(data: bytes, context: grpc.ServicerContext) -> bytes:
            context.add_callback(self.gone.set)
            self.entered.set()
            return self.wait()

        def watched(data: bytes, context: grpc.ServicerContext, send: Any) -> None:
            context.add_callback(self.gone.set)
            self.notify = send
            send(b"first")

        watched.experimental_non_blocking = True  # type: ignore[attr-defined]
        one, late = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        return grpc.method_handlers_generic_handler(
            "test",
            {
                "Twice": one(twice),
                "Many": late(many),
                "Joined": grpc.stream_unary_rpc_method_handler(joined),
                "Each": grpc.stream_stream_rpc_method_handler(each),
                "Told": one(told),
                "Refuses": one(refuses),
                "Sets": one(sets),
                "Raises": one(raises),
                "Waits": one(waits),
                "Watched": late(watched),
                "Number": one(lambda n, _: n + 1, lambda d: int(d), lambda n: str(n).encode()),
                "Taken": one(self.taken),
                "Full": one(Full()),
                "FullToo": grpc.stream_unary_rpc_method_handler(Full()),
                "Echo": grpc.stream_stream_rpc_method_handler(self.echo),
            },
        )

    def add(self, name: str, handle: Any) -> None:
        """Register one more handler of a message each way."""
        handler = grpc.unary_unary_rpc_method_handler(handle)
        found = grpc.method_handlers_generic_handler("test", {name: handler})
        self.server.add_generic_rpc_handlers((found,))

    def unary(self, name: str, data: bytes, **options: Any) -> Any:
        return self.channel.unary_unary(f"/test/{name}")(data, timeout=PATIENCE_S, **options)

    def refusal(self, name: str, data: bytes = b"") -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.unary(name, data)
        return caught.value.code(), caught.value.details()

    def wait(self) -> bytes:
        self.waiting += 1
        assert self.gate.wait(PATIENCE_S)
        return b"waited"

    def close(self) -> None:
        self.gate.set()
        self.channel.close()
        assert self.server.stop(0.0).wait(PATIENCE_S)
        self.pool.shutdown(wait=False)


@pytest.fixture
def lab() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[Lab]:
    made = Lab()
    yield made
    made.close()


class TestByGrpcsClient:
    def test_one_message_each_way(self, lab: Lab) -> None:
        for size in (0, 1, 1000, 30_000, 70_000, LIMIT // 2 - 1):
            data = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
            assert lab.unary("Twice", data) == data * 2
            assert lab.unary("Taken", data) == data + b"|" + data

    def test_many_answers_come_in_order_however_slowly_they_are_taken(self, lab: Lab) -> None:
        answers = lab.channel.unary_stream(MANY)(b"3000", timeout=PATIENCE_S)
        assert [a[0] for a in answers] == [n % 256 for n in range(3000)]

    def test_many_requests(self, lab: Lab) -> None:
        parts = [bytes([n]) * 50_000 for n in range(60)]
        joined = lab.channel.stream_unary("/test/Joined")
        assert joined(iter(parts), timeout=PATIENCE_S) == b"".join(parts)
        each = lab.channel.stream_stream("/test/Each")
        assert list(each(iter(parts), timeout=PATIENCE_S)) == parts

    def test_a_stream_that_is_taken_over(self, lab: Lab) -> None:
        parts = [bytes([n]) * 50_000 for n in range(60)]
        stream = lab.channel.stream_stream("/test/Echo")
        assert list(stream(iter(parts), timeout=PATIENCE_S)) == parts
        assert eventually(lambda: lab.echo.gone_out == 60, "all are said to be sent")

    def test_many_callers_at_once(self, lab: Lab) -> None:
        with ThreadPoolExecutor(16) as callers:
            for name in ("Twice", "Taken"):
                answers = callers.map(lambda n: lab.unary(name, b"%d" % n), range(300))  # noqa: B023
                assert [a[: len(b"%d" % n)] for n, a in enumerate(answers)] == [
                    b"%d" % n for n in range(300)
                ]

    def test_metadata_deadline_and_peer(self, lab: Lab) -> None:
        answer, call = lab.channel.unary_unary("/test/Told").with_call(
            b"", timeout=20, metadata=(("key", "value"), ("key-bin", b"\x00\x01"))
        )
        left, key, binary, peer = eval(answer)
        assert (left, key, binary) == (True, "value", b"\x00\x01")
        assert peer.startswith("ipv4:127.0.0.1:")
        assert ("first", "1") in call.initial_metadata()
        assert set(call.trailing_metadata()) == {("k", "v"), ("k-bin", b"\x00\xff")}

    @pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no socket listens for both")
    def test_a_peer_is_named_alike_wherever_it_is_listened_for(self) -> None:
        """A caller by IPv4 was one by IPv6 for a server that listens for both."""
        pool = BoundedPool("test", 1, 1)
        kind = grpc.unary_unary_rpc_method_handler(lambda data, context: context.peer().encode())
        handlers = grpc.method_handlers_generic_handler("test", {"Peer": kind})
        for made in (grpc.server(pool), Server(pool, max_message_length=LIMIT, max_calls=4)):
            made.add_generic_rpc_handlers((handlers,))
            port = made.add_insecure_port("[::]:0")
            made.start()
            try:
                with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                    peer = channel.unary_unary("/test/Peer")(b"", timeout=PATIENCE_S)
                    assert peer.startswith(b"ipv4:127.0.0.1:")
            finally:
                assert made.stop(0.0).wait(PATIENCE_S)
        pool.shutdown(wait=False)

    def test_what_takes_a_call_over_may_name_a_version(self, lab: Lab) -> None:
        _, call = lab.channel.unary_unary("/test/Taken").with_call(b"x", timeout=PATIENCE_S)
        assert ("splitlearn-version", "v7") in call.trailing_metadata()

    def test_refusals(self, lab: Lab) -> None:
        code = grpc.StatusCode
        assert lab.refusal("Refuses") == (code.FAILED_PRECONDITION, "50 % of «it»\nis missing")
        assert lab.refusal("Sets") == (code.NOT_FOUND, "nowhere")
        assert lab.refusal("Full") == (code.RESOURCE_EXHAUSTED, "there is no room")
        # Of whatever kind its handler is, without a thread.
        assert lab.refusal("FullToo") == (code.RESOURCE_EXHAUSTED, "there is no room")
        assert lab.refusal("Full", b"x" * LIMIT)[0] is code.RESOURCE_EXHAUSTED
        assert lab.refusal("Nothing")[0] is code.UNIMPLEMENTED
        assert lab.refusal("Taken", b"fail")[0] is code.INTERNAL
        assert lab.refusal("Number", b"no")[0] is code.INVALID_ARGUMENT
        assert lab.unary("Number", b"41") == b"42"
        what, text = lab.refusal("Raises")
        assert what is code.UNKNOWN
        assert "secret" not in text

    @pytest.mark.parametrize(
        "metadata",
        [(("Key", "v"),), (("kéy", "v"),), (("k", "two\nlines"),), (("k", "é"),), (("k", None),)],
    )
    def test_metadata_that_cannot_travel_is_an_error_of_its_handler(
        self, lab: Lab, metadata: Any
    ) -> None:
        """The call was never ended."""

        def trailing(data: bytes, context: grpc.ServicerContext) -> bytes:
            context.set_trailing_metadata(metadata)
            return data

        def first(data: bytes, context: grpc.ServicerContext) -> bytes:
            context.send_initial_metadata(metadata)
            return data

        lab.add("Added", trailing)
        lab.add("AddedFirst", first)
        for name in ("Added", "AddedFirst"):
            assert lab.refusal(name)[0] is grpc.StatusCode.UNKNOWN

    def test_metadata_is_bytes_where_its_key_says_so(self, lab: Lab) -> None:
        def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
            context.set_trailing_metadata((("text", b"of bytes"), ("text-bin", "of text")))
            return data

        lab.add("Added", handle)
        _, call = lab.channel.unary_unary("/test/Added").with_call(b"x", timeout=PATIENCE_S)
        found = set(call.trailing_metadata())
        assert found == {("text", "of bytes"), ("text-bin", b"of text")}

    def test_what_is_no_status_ends_a_call_as_unknown(self, lab: Lab) -> None:
        def aborts(data: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(5, None)  # type: ignore[arg-type]

        lab.add("Aborts", aborts)
        assert lab.refusal("Aborts") == (grpc.StatusCode.UNKNOWN, "")

    def test_a_stream_may_be_answered_before_it_is_begun(self, lab: Lab) -> None:
        """Who waited for its first answer to go out was never told, if its thread was that quick."""

        class Eager(BoundedPool):
            def submit(self, *arguments: Any) -> Any:  # type: ignore[override]
                future = super().submit(*arguments)
                wait([future], timeout=2.0)
                return future

        def answers(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            yield b"1"
            yield b"2"

        pool = Eager("eager", 1, 1)
        server = Server(pool, max_message_length=LIMIT, max_calls=4)
        kind = grpc.stream_stream_rpc_method_handler(answers)
        handlers = grpc.method_handlers_generic_handler("test", {"Answers": kind})
        server.add_generic_rpc_handlers((handlers,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                stream = channel.stream_stream("/test/Answers")
                assert list(stream(iter(()), timeout=PATIENCE_S)) == [b"1", b"2"]
        finally:
            assert server.stop(0.0).wait(PATIENCE_S)
            pool.shutdown(wait=False)

    def test_a_message_that_is_too_large_is_refused_and_others_go_on(self, lab: Lab) -> None:
        for name in ("Twice", "Taken"):
            status, details = lab.refusal(name, b"x" * (LIMIT + 1))
            assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert str(LIMIT) in details
        assert lab.unary("Twice", b"x") == b"xx"

    def test_an_answer_that_is_too_large_is_not_sent(self, lab: Lab) -> None:
        for name in ("Twice", "Taken"):
            status, details = lab.refusal(name, b"x" * (LIMIT // 2 + 1))
            assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert f"the most that is sent is {LIMIT}" in details
        assert lab.unary("Twice", b"x") == b"xx"

    @pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate])
    def test_compressed_requests(self, lab: Lab, how: grpc.Compression) -> None:
        data = b"abc" * 10_000
        assert lab.unary("Twice", data, compression=how) == data * 2
        assert lab.unary("Taken", data, compression=how) == data + b"|" + data

    def test_a_caller_that_goes_is_noticed(self, lab: Lab) -> None:
        call = lab.channel.unary_unary("/test/Waits").future(b"", timeout=PATIENCE_S)
        assert lab.entered.wait(PATIENCE_S)
        call.cancel()
        assert lab.gone.wait(PATIENCE_S)

    def test_a_deadline_is_the_callers(self, lab: Lab) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            lab.channel.unary_unary("/test/Waits")(b"", timeout=0.1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert lab.gone.wait(PATIENCE_S)

    def test_what_is_told_later_without_a_thread(self, lab: Lab) -> None:
        answers = lab.channel.unary_stream("/test/Watched")(b"", timeout=PATIENCE_S)
        assert next(answers) == b"first"
        lab.notify(b"second")
        assert next(answers) == b"second"
        lab.notify(None)
        assert list(answers) == []
        assert lab.gone.wait(PATIENCE_S)

    def test_more_calls_than_there_may_be_are_refused(self, lab: Lab) -> None:
        lab.taken.keeps = True
        taken = lab.channel.unary_unary("/test/Taken")
        calls = [taken.future(b"%d" % n, timeout=PATIENCE_S) for n in range(MOST_CALLS)]
        eventually(lambda: len(lab.taken.kept) == MOST_CALLS, "all are taken")
        status, details = lab.refusal("Twice")
        assert (status, str(MOST_CALLS) in details) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        for data, call in lab.taken.kept:
            call.send(data)
        assert [call.result() for call in calls] == [b"%d" % n for n in range(MOST_CALLS)]
        eventually(lambda: lab.server._calls == 0, "room comes back")
        assert lab.unary("Twice", b"x") == b"xx"

    def test_a_callback_that_fails_keeps_no_other_call_from_being_told(self, lab: Lab) -> None:
        """Its connection was closed, and the calls behind it on it counted for ever."""

        def fails() -> None:
            raise ValueError("of the handler")

        def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
            context.add_callback(fails)
            return lab.wait()

        lab.add("Fails", handle)
        with Caller(lab.port) as caller:
            for number in [caller.begin("/test/Fails"), caller.begin("/test/Waits")]:
                caller.send(number, message(b"x"))
            eventually(lambda: lab.entered.is_set() and lab.waiting == 2, "both wait")
        assert lab.gone.wait(PATIENCE_S)
        eventually(lambda: lab.server._calls == 0, "both are over")


class TestStopping:
    def test_running_calls_are_waited_for_and_new_ones_turned_away(self, lab: Lab) -> None:
        call = lab.channel.unary_unary("/test/Waits").future(b"", timeout=PATIENCE_S)
        assert lab.entered.wait(PATIENCE_S)
        stopped = lab.server.stop(PATIENCE_S)

        def refused() -> bool:
            try:
                lab.unary("Twice", b"x")
            except grpc.RpcError as error:
                return error.code() is grpc.StatusCode.UNAVAILABLE
            return False

        eventually(refused, "new calls are turned away")
        assert not stopped.is_set()
        lab.gate.set()
        assert call.result() == b"waited"
        assert stopped.wait(PATIENCE_S)
        assert not lab.server.wait_for_termination(0.0)

    def test_what_does_not_end_in_time_is_ended(self, lab: Lab) -> None:
        lab.taken.keeps = True
        taken = lab.channel.unary_unary("/test/Taken").future(b"x", timeout=PATIENCE_S)
        waits = lab.channel.unary_unary("/test/Waits").future(b"", timeout=PATIENCE_S)
        eventually(lambda: lab.taken.kept and lab.entered.is_set(), "both run")
        assert lab.server.stop(0.0).wait(PATIENCE_S)
        for call in (taken, waits):
            assert call.exception().code() is grpc.StatusCode.UNAVAILABLE
        lab.taken.kept[0][1].send(b"too late")  # harms nobody

    def test_an_answer_is_not_lost_that_its_caller_still_reads(self, lab: Lab) -> None:
        """A connection that is closed while its caller sends, which it does as it reads, is cut at once."""
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.settimeout(PATIENCE_S)
            slow.connect(("127.0.0.1", lab.port))
            asked, ping = message(b"x" * 400_000), head(8, frames.PING) + bytes(8)
            slow.sendall(frames.PREFACE + frames.settings({frames.INITIAL_WINDOW: 2**30}))
            slow.sendall(head(4, frames.WINDOW_UPDATE) + struct.pack(">I", 2**30))
            slow.sendall(a_call(1, b"/test/Twice") + head(len(asked), frames.DATA, 1, 1) + asked)
            found = 0
            while found < 1000:  # some of the answer is there
                found += len(slow.recv(100))
            eventually(lambda: not lab.server._calls, "all of it has gone to the system")
            stopped = lab.server.stop(PATIENCE_S)
            assert not stopped.wait(0.3)
            with contextlib.suppress(OSError):  # once all has arrived
                while got := slow.recv(30_000):
                    found += len(got)
                    slow.sendall(ping)
            assert found > 800_000
            assert stopped.wait(PATIENCE_S)

    def test_stopping_it_again_leaves_no_thread_behind(self, lab: Lab) -> None:
        assert lab.server.stop(0.0).wait(PATIENCE_S)
        before = {*threading.enumerate()}
        for _ in range(3):
            assert lab.server.stop(0.0).is_set()
        eventually(lambda: {*threading.enumerate()} <= before, "all threads have ended")

    def test_one_that_never_started_lets_go_of_its_port(self) -> None:
        pool = BoundedPool("test", 1, 1)
        first = Server(pool, max_message_length=10, max_calls=10)
        port = first.add_insecure_port("127.0.0.1:0")
        second = Server(pool, max_message_length=10, max_calls=10)
        with pytest.raises(RuntimeError, match="cannot listen"):
            second.add_insecure_port(f"127.0.0.1:{port}")
        assert first.stop(None).is_set()
        assert second.add_insecure_port(f"127.0.0.1:{port}") == port
        assert second.stop(None).is_set()
        pool.shutdown()

    def test_it_starts_once(self, lab: Lab) -> None:
        with pytest.raises(ValueError, match="started before"):
            lab.server.start()


class TestByHttp2:
    @settings(
        max_examples=40,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(
        data=st.binary(max_size=300),
        piece=st.integers(1, 50),
        pad=st.one_of(st.none(), st.integers(0, 20)),
        fields=st.lists(st.text("abc", min_size=1, max_size=2000), max_size=3),
    )
    def test_however_it_is_cut(self, shared: Lab, data, piece, pad, fields) -> None:
        """Headers, data and padding in pieces of any size. Fails if padding is not skipped."""
        with Caller(shared.port) as caller:
            number = caller.h2.get_next_available_stream_id()
            headers = [(":method", "POST"), (":scheme", "http"), (":authority", "x")]
            headers += [(":path", TWICE), ("content-type", "application/grpc")]
            headers += [(f"x-{n}", text) for n, text in enumerate(fields)]
            caller.h2.send_headers(number, headers)
            caller.flush(piece)
            caller.h2.send_data(number, message(data), end_stream=True, pad_length=pad)
            caller.flush(piece)
            assert caller.wait_for_end(number)["grpc-status"] == "0"
            assert caller.data[number] == message(data * 2)

    @pytest.mark.parametrize("window", [0, 1, 100, 65_535, 2**20])
    @pytest.mark.parametrize("frame", [16_384, 100_000])
    def test_no_more_is_sent_than_is_taken(self, shared: Lab, window: int, frame: int) -> None:
        """`h2` ends the connection if a window or a frame is exceeded."""
        with Caller(shared.port) as caller:
            caller.h2.update_settings(
                {
                    h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window,
                    h2.settings.SettingCodes.MAX_FRAME_SIZE: frame,
                }
            )
            caller.flush()
            number = caller.begin(TWICE)
            caller.send(number, message(b"x" * 200_000))
            if window < 1000:
                # What is held back goes out as the window widens, by a setting and by updates.
                setting = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 70_000}
                caller.h2.update_settings(setting)
                caller.flush()
            assert caller.wait_for_end(number)["grpc-status"] == "0"
            assert caller.data[number] == message(b"x" * 400_000)

    def test_a_slow_reader_holds_up_no_other_call(self, shared: Lab) -> None:
        with Caller(shared.port) as slow, Caller(shared.port) as other:
            first = slow.begin(TWICE)
            slow.send(first, message(b"x" * 2_000_000))
            assert other.call(TWICE, b"y") == message(b"yy")
            second = slow.begin(TWICE)
            slow.send(second, message(b"z"))
            slow.wait_for_end(second)
            slow.wait_for_end(first)
            assert slow.data[first] == message(b"x" * 4_000_000)
            assert slow.data[second] == message(b"zz")

    def test_a_call_counts_until_its_answer_has_gone_out(self, lab: Lab) -> None:
        """Else one who never reads could have the server hold any number of answers."""
        with Caller(lab.port) as caller:
            caller.reads = False
            number = caller.begin(TWICE)
            caller.send(number, message(b"x" * 200_000))
            while len(caller.data[number]) < 65_535:
                caller.read()
            assert lab.server._calls == 1
            caller.h2.acknowledge_received_data(65_535, number)
            caller.reads = True
            caller.flush()
            assert caller.wait_for_end(number)["grpc-status"] == "0"
            eventually(lambda: lab.server._calls == 0, "it is over")

    def test_a_call_given_up_frees_what_waited_for_it(self, shared: Lab) -> None:
        with Caller(shared.port) as caller:
            caller.reads = False
            number = caller.begin(TWICE)
            caller.send(number, message(b"x" * 200_000))
            while len(caller.data[number]) < 65_535:
                caller.read()
            caller.h2.reset_stream(number)
            caller.flush()
            caller.reads = True
            caller.h2.increment_flow_control_window(2**20)
            caller.flush()
            assert caller.call(TWICE, b"y") == message(b"yy")

    def test_reading_pauses_while_a_stream_does_not_want_more(self, lab: Lab) -> None:
        lab.echo.closed = True
        with Caller(lab.port) as caller:
            number = caller.begin("/test/Echo")
            for n in range(3):
                caller.send(number, message(bytes([n])), ends=False)
            eventually(lambda: lab.echo.received_all, "the first comes")
            assert caller.h2.ping(b"12345678") is None
            caller.flush()
            while not caller.pongs:
                caller.read()
            assert lab.echo.received_all == [b"\x00"]
            lab.echo.closed = False
            lab.echo.wires[0].read_on()
            eventually(lambda: len(lab.echo.received_all) == 3, "the others come")
            caller.send(number, b"")
            assert caller.wait_for_end(number)["grpc-status"] == "0"

    def test_what_waits_for_a_paused_stream_waits_compressed(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else a megabyte that may arrive unasked becomes a gigabyte that is held."""
        unpacked = 0
        plain = Assembly.plain

        def counted(assembly: Assembly, packed: Any) -> Any:
            nonlocal unpacked
            unpacked += 1
            return plain(assembly, packed)

        monkeypatch.setattr(Assembly, "plain", counted)
        lab.echo.closed = True
        with Caller(lab.port) as caller:
            number = caller.begin("/test/Echo", ("grpc-encoding", "gzip"))
            packed = message(gzip.compress(bytes(LIMIT)), 1)
            caller.send(number, packed * 5, ends=False)
            eventually(lambda: lab.echo.received_all, "the first comes")
            caller.h2.ping(b"12345678")
            caller.flush()
            while not caller.pongs:
                caller.read()
            assert unpacked == 1
            lab.echo.closed = False
            lab.echo.wires[0].read_on()
            caller.send(number, b"")
            assert caller.wait_for_end(number)["grpc-status"] == "0"
            assert lab.echo.received_all == 5 * [bytes(LIMIT)]

    @pytest.mark.parametrize("name", ["Twice", "Taken", "Echo"])
    def test_nobody_waits_while_a_message_is_unpacked(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """A hundred kilobytes became a hundred megabytes on the thread that serves everybody."""
        plain = Assembly.plain

        def waits(assembly: Assembly, packed: Any) -> Any:
            lab.wait()
            return plain(assembly, packed)

        monkeypatch.setattr(Assembly, "plain", waits)
        with Caller(lab.port) as caller:
            number = caller.begin(f"/test/{name}", ("grpc-encoding", "gzip"))
            data = bytes(LIMIT // 4)
            # What comes behind it is not handed over before it.
            more = message(b"more") + message(gzip.compress(b"most"), 1)
            caller.send(number, message(gzip.compress(data), 1) + more)
            eventually(lambda: lab.waiting == 1, "it is being unpacked")
            assert lab.unary("Twice", b"x") == b"xx"
            lab.gate.set()
            assert caller.wait_for_end(number)["grpc-status"] == "0"
            wanted = {
                "Twice": message(data * 2),
                "Taken": message(data + b"|" + data),
                "Echo": message(data) + message(b"more") + message(b"most"),
            }
            assert caller.data[number] == wanted[name]

    def test_a_call_that_ends_while_its_message_is_unpacked_is_over(
        self, lab: Lab, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Assembly, "plain", lambda assembly, packed: lab.wait())
        with Caller(lab.port) as caller:
            packed = message(gzip.compress(bytes(LIMIT)), 1)
            for _ in range(3):
                number = caller.begin("/test/Taken", ("grpc-encoding", "gzip"))
                caller.send(number, packed)
                caller.h2.reset_stream(number)
                caller.flush()
            assert caller.call(TWICE, b"y") == message(b"yy")
            lab.gate.set()
            eventually(lambda: lab.server._calls == 0 and lab.server._asides == 0, "all are over")
            assert lab.pool._outstanding == 0

    def test_a_paused_stream_takes_no_more_than_its_window(self, lab: Lab) -> None:
        lab.echo.closed = True
        with Caller(lab.port) as caller:
            number = caller.begin("/test/Echo")
            caller.send(number, message(b"first"), ends=False)
            eventually(lambda: lab.echo.received_all, "the first comes")
            caller.h2.ping(b"12345678")
            caller.flush()
            while not caller.pongs:
                caller.read()
            left = caller.h2.local_flow_control_window(number)
            # So much may be on its way to the server, and no more.
            assert left <= WINDOW
            before = caller.h2.outbound_flow_control_window
            assert before > 2**30

    @pytest.mark.parametrize("size", [15_000, 16_384, 40_000])
    def test_long_headers_come_in_frames_that_callers_take(self, lab: Lab, size: int) -> None:
        """`h2` ends the connection, and all its calls, when a frame is too large."""

        def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
            context.send_initial_metadata((("long", "x" * size),))
            context.abort(grpc.StatusCode.NOT_FOUND, "y" * size)

        lab.add("Long", handle)
        with Caller(lab.port) as caller:
            caller.h2.decoder.max_header_list_size = 2 * size
            number = caller.begin("/test/Long")
            caller.send(number, message(b"x"))
            assert caller.wait_for_end(number)["grpc-message"] == "y" * size
            assert caller.headers[number]["long"] == "x" * size

    def test_padding_alone_does_not_use_a_window_up(self, lab: Lab) -> None:
        with Caller(lab.port) as caller:
            number = caller.begin("/test/Echo")
            for _ in range(2 * WINDOW // 256):
                while caller.h2.local_flow_control_window(number) < 256:
                    caller.read()
                caller.h2.send_data(number, b"", pad_length=255)
                caller.flush()
            caller.send(number, message(b"x"))
            assert caller.wait_for_end(number)["grpc-status"] == "0"

    def test_pings_are_answered(self, shared: Lab) -> None:
        with Caller(shared.port) as caller:
            caller.h2.ping(b"12345678")
            caller.flush()
            while not caller.pongs:
                caller.read()
            assert caller.pongs == [b"12345678"]

    @pytest.mark.parametrize(
        ("field", "status"),
        [(("content-type", "text/plain"), "415"), (("grpc-timeout", "soon"), "400")],
    )
    def test_what_is_no_call_gets_an_answer_of_http(
        self, shared: Lab, field: tuple[str, str], status: str
    ) -> None:
        with Caller(shared.port) as caller:
            number = caller.h2.get_next_available_stream_id()
            fields = {":method": "POST", ":scheme": "http", ":authority": "x", ":path": TWICE}
            fields |= {"content-type": "application/grpc"} | dict([field])
            caller.h2.send_headers(number, list(fields.items()), end_stream=True)
            caller.flush()
            assert caller.wait_for_end(number)[":status"] == status
            assert caller.call(TWICE, b"y") == message(b"yy")

    def test_a_call_without_a_message_or_within_one_is_ended(self, shared: Lab) -> None:
        with Caller(shared.port) as caller:
            for name in ("Twice", "Taken"):
                number = caller.begin(f"/test/{name}", ends=True)
                assert caller.wait_for_end(number)["grpc-status"] == "12"
                number = caller.begin(f"/test/{name}")
                caller.send(number, message(b"xyz")[:-1])
                assert caller.wait_for_end(number)["grpc-status"] == "13"

    def test_trailers_end_a_request(self, shared: Lab) -> None:
        with Caller(shared.port) as caller:
            number = caller.begin(TWICE)
            caller.send(number, message(b"x"), ends=False)
            caller.h2.send_headers(number, [("x-last", "1")], end_stream=True)
            caller.flush()
            assert caller.wait_for_end(number)["grpc-status"] == "0"
            assert caller.call(TWICE, b"y") == message(b"yy")


def head(size: int, kind: int, flags: int = 0, stream: int = 0) -> bytes:
    return frames.head(size, kind, flags, stream)


def a_call(number: int, path: bytes) -> bytes:
    """The headers of a call."""
    block = b"\x83" + b"".join(
        b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
        for name, value in ((b":path", path), (b"content-type", b"application/grpc"))
    )
    return head(len(block), frames.HEADERS, 4, number) + block


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (head(4, frames.DATA, 0, 1) + b"xxxx", frames.PROTOCOL_ERROR),
        (head(4, frames.DATA, 0, 0) + b"xxxx", frames.PROTOCOL_ERROR),
        (head(2**21, frames.HEADERS, 4, 1), frames.FRAME_SIZE_ERROR),
        (head(1, frames.HEADERS, 4, 2) + b"\x83", frames.PROTOCOL_ERROR),
        (head(1, frames.HEADERS, 12, 1) + b"\x05", frames.PROTOCOL_ERROR),
        (head(0, frames.HEADERS, 12, 1), frames.PROTOCOL_ERROR),
        (head(1, frames.HEADERS, 4, 1) + b"\xff", frames.COMPRESSION_ERROR),
        (
            head(1, frames.HEADERS, 0, 1) + b"\x83" + head(8, frames.PING) + bytes(8),
            frames.PROTOCOL_ERROR,
        ),
        (head(1, frames.CONTINUATION, 4, 1) + b"\x83", frames.PROTOCOL_ERROR),
        (head(4, frames.RESET, 0, 1) + bytes(4), frames.PROTOCOL_ERROR),
        (head(5, frames.SETTINGS) + bytes(5), frames.FRAME_SIZE_ERROR),
        (head(6, frames.SETTINGS) + struct.pack(">HI", 5, 1), frames.PROTOCOL_ERROR),
        (head(6, frames.SETTINGS) + struct.pack(">HI", 4, 2**31), frames.FLOW_CONTROL_ERROR),
        (head(7, frames.PING) + bytes(7), frames.FRAME_SIZE_ERROR),
        (head(4, frames.WINDOW_UPDATE, 0, 0) + bytes(4), frames.FLOW_CONTROL_ERROR),
        (head(4, frames.WINDOW_UPDATE, 0, 0) + b"\x7f\xff\xff\xff", frames.FLOW_CONTROL_ERROR),
        (head(4, frames.WINDOW_UPDATE, 0, 1) + b"\x00\x00\x00\x01", frames.PROTOCOL_ERROR),
        (head(3, frames.WINDOW_UPDATE, 0, 0) + bytes(3), frames.FRAME_SIZE_ERROR),
        (head(4, frames.PUSH_PROMISE, 4, 1) + bytes(4), frames.PROTOCOL_ERROR),
        (
            head(1, frames.HEADERS, 0, 1)
            + b"\x83"
            + 5 * (head(60_000, frames.CONTINUATION, 0, 1) + bytes(60_000)),
            frames.ENHANCE_YOUR_CALM,
        ),
    ],
)
def test_what_breaks_the_rules_ends_its_connection_alone(
    shared: Lab, wrong: bytes, code: int
) -> None:
    with Caller(shared.port) as bystander, Caller(shared.port) as caller:
        caller.raw(wrong)
        caller.wait_until_closed()
        assert caller.gone_away == code
        assert bystander.call(TWICE, b"y") == message(b"yy")


def test_what_is_no_http2_is_turned_away(shared: Lab) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), PATIENCE_S) as caller:
        caller.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"gRPC over HTTP/2" in caller.recv(1000)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=400), st.booleans())
def test_nothing_that_arrives_stops_the_server(shared: Lab, junk: bytes, greets: bool) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), PATIENCE_S) as caller:
        caller.sendall((frames.PREFACE if greets else b"") + junk)
        caller.shutdown(socket.SHUT_WR)
        while caller.recv(1 << 16):
            pass
    with Caller(shared.port) as other:
        assert other.call(TWICE, b"y") == message(b"yy")


def test_a_caller_that_never_reads_what_it_asks_for_is_not_kept(shared: Lab) -> None:
    """Pings whose answers nobody takes would fill the memory."""
    with socket.create_connection(("127.0.0.1", shared.port), PATIENCE_S) as caller:
        caller.sendall(frames.PREFACE)
        pings = (head(8, frames.PING) + bytes(8)) * 10_000
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for _ in range(1000):
                caller.sendall(pings)


def no_post(number: int) -> bytes:
    """What is no call."""
    return head(1, frames.HEADERS, 5, number) + b"\x82"


def refused(number: int) -> bytes:
    """A call that is refused."""
    return a_call(number, b"/test/Full")


def broken_off(number: int) -> bytes:
    """A call with data behind its end."""
    data = head(1, frames.DATA, 1, number) + b"\x00"
    return a_call(number, b"/test/Echo") + data + data


@pytest.mark.parametrize("call", [no_post, refused, broken_off])
def test_a_caller_that_never_reads_how_its_calls_end_is_not_kept(lab: Lab, call: Any) -> None:
    """Beyond the most calls there may be, none counts: what they are answered would fill the memory."""
    with socket.create_connection(("127.0.0.1", lab.port), PATIENCE_S) as caller:
        caller.sendall(frames.PREFACE)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            for begin in range(1, 2_000_000, 20_000):
                caller.sendall(b"".join(call(n) for n in range(begin, begin + 20_000, 2)))
    eventually(lambda: lab.server._calls == 0, "all are over")
    assert lab.unary("Twice", b"x") == b"xx"


def test_windows_that_widen_byte_by_byte_cost_nobody_else_the_time(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each update had all answers looked at that wait: a second of the polling thread for some kilobytes."""
    looks = 0
    pump = Outgoing._pump

    def counted(outgoing: Outgoing) -> Any:
        nonlocal looks
        looks += 1
        return pump(outgoing)

    with Caller(lab.port) as caller:
        caller.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        caller.flush()
        number = caller.begin(TWICE)
        caller.send(number, message(b"x"))
        eventually(lambda: lab.server._connections and not _sent_all(lab), "its answer waits")
        monkeypatch.setattr(Outgoing, "_pump", counted)
        update = head(4, frames.WINDOW_UPDATE, 0, 0) + b"\x00\x00\x00\x01"
        caller.raw(1000 * (update + head(0, frames.SETTINGS)))
        caller.h2.ping(b"12345678")
        caller.flush()
        while not caller.pongs:
            caller.read()
        assert looks < 100
        caller.h2.increment_flow_control_window(100, number)
        caller.flush()
        assert caller.wait_for_end(number)["grpc-status"] == "0"


def test_calls_that_are_cancelled_at_once_do_not_fill_a_pool_whose_threads_are_held(
    lab: Lab,
) -> None:
    """They are over for the server, and each left its message with the pool."""
    waits = lab.channel.unary_unary("/test/Waits")
    held = [waits.future(b"", timeout=PATIENCE_S) for _ in range(8)]
    eventually(lambda: lab.waiting == 8, "all threads are held")
    data = message(b"x")
    with socket.create_connection(("127.0.0.1", lab.port), PATIENCE_S) as caller:
        caller.sendall(frames.PREFACE)
        for n in range(1, 4001, 2):
            begin = a_call(n, b"/test/Twice") + head(len(data), frames.DATA, 1, n) + data
            caller.sendall(begin + head(4, frames.RESET, 0, n) + bytes(4))
        caller.shutdown(socket.SHUT_WR)
        while caller.recv(1 << 16):
            pass
    assert lab.pool._work_queue.qsize() <= lab.pool.limit
    assert lab.refusal("Twice")[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    lab.gate.set()
    assert [call.result() for call in held] == 8 * [b"waited"]
    eventually(lambda: not lab.pool.full, "there is room again")
    assert lab.unary("Twice", b"x") == b"xx"


def test_connections_take_turns_however_much_one_has_sent(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that was read of one was taken before another was looked at: seconds, of small frames."""
    monkeypatch.setattr(connection, "TURN_S", -1.0)
    looking = threading.Event()

    class Holds:
        experimental_thread_pool = lab.pool

        def begin(self, data: Any, call: Any) -> None:
            looking.set()
            assert lab.gate.wait(PATIENCE_S)
            call.send(data)

    lab.add("Holds", Holds())
    lab.taken.keeps = True
    with Caller(lab.port) as first, Caller(lab.port) as second:
        for caller in (first, second):
            assert caller.call(TWICE, b"y") == message(b"yy")
        held = lab.channel.unary_unary("/test/Holds").future(b"x", timeout=PATIENCE_S)
        assert looking.wait(PATIENCE_S)

        def call(number: int, data: bytes) -> bytes:
            begin, data = a_call(number, b"/test/Taken"), message(data)
            return begin + head(len(data), frames.DATA, 1, number) + data

        first.raw(b"".join(call(n, b"first") for n in range(3, 63, 2)))
        second.raw(call(3, b"second"))
        lab.gate.set()
        assert held.result() == b"x"
        eventually(lambda: len(lab.taken.kept) == 31, "all are begun")
    assert b"second" in [data for data, _ in lab.taken.kept[:10]]


@pytest.mark.parametrize("size", [10, 100_000, 300_000])
def test_what_waits_for_its_turn_is_taken_in_order(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """A frame, or a piece of one, at a time, with no byte after it that would tell of the rest."""
    monkeypatch.setattr(connection, "TURN_S", -1.0)
    parts = [bytes([n]) * size for n in range(20)]
    with Caller(lab.port) as caller:
        number = caller.begin("/test/Echo")
        caller.send(number, b"".join(map(message, parts)))
        assert caller.wait_for_end(number)["grpc-status"] == "0"
        assert caller.data[number] == b"".join(map(message, parts))
        assert caller.call(TWICE, b"y") == message(b"yy")
    assert lab.unary("Twice", bytes(LIMIT // 4)) == bytes(LIMIT // 2)
    eventually(lambda: not lab.server._behind, "nobody waits for a turn")


def _sent_all(lab: Lab) -> bool:
    return all(connection.outgoing.is_empty for connection in lab.server._connections)


@pytest.mark.skipif(sys.platform == "darwin", reason="127.0.0.1 is the only such address")
class TestANameOfTwoAddresses:
    """As `localhost` is where there is IPv6. Callers try one and then the other."""

    @pytest.fixture(autouse=True)
    def _two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        two = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.2")]
        monkeypatch.setattr(listening, "_names", lambda host: two)

    @pytest.mark.parametrize("taken", ["127.0.0.1", "127.0.0.2"])
    def test_is_taken_if_one_of_them_is(self, taken: str) -> None:
        """The node listened at the other one, and some of its callers got to somebody else."""
        with socket.create_server((taken, 0)) as other, pytest.raises(OSError, match="in use"):
            listening.listen(f"localhost:{other.getsockname()[1]}")

    def test_gets_a_port_that_is_free_at_both(self, monkeypatch: pytest.MonkeyPatch) -> None:
        create, failed = socket.create_server, []

        def once(address: Any, **options: Any) -> socket.socket:
            if address[0] == "127.0.0.2" and not failed:
                failed.append(address)
                raise OSError(errno.EADDRINUSE, "in use")
            return create(address, **options)

        monkeypatch.setattr(socket, "create_server", once)
        sockets = listening.listen("localhost:0")
        assert len({each.getsockname()[1] for each in sockets}) == 1
        assert len(sockets) == 2
        for each in sockets:
            each.close()


def test_turning_callers_away_closes_no_file_of_another_thread(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The descriptor that is kept for that may be another thread's before it is had back."""
    opens, closes = os.open, os.close
    others: list[int] = []

    def close(descriptor: int) -> None:
        closes(descriptor)
        if not others:
            others.append(opens(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            assert others == [descriptor]

    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    def no_accept() -> Any:
        raise OSError(errno.EMFILE, "too many open files")

    class Listening:
        accept = staticmethod(no_accept)

    spare = lab.server._spare
    monkeypatch.setattr(os, "close", close)
    monkeypatch.setattr(os, "open", refuse)
    for _ in range(2):
        lab.server._accept(Listening())  # type: ignore[arg-type]
    monkeypatch.undo()
    assert others == [spare]
    os.close(others[0])  # fails if it was closed before
    lab.server._accept(Listening())  # type: ignore[arg-type]
    assert lab.server._spare is not None


def test_calls_that_have_ended_are_freed_without_a_collector(lab: Lab) -> None:
    """What a call consists of must not keep itself: memory grew between two runs of the collector."""

    def of_calls() -> int:
        # The type itself is asked: some objects of torch make themselves up when they are looked at.
        return sum(type(each) is StreamOfCall for each in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = of_calls()  # the log keeps calls of other tests, with their errors
        for _ in range(5):
            lab.unary("Taken", b"x")
            lab.unary("Twice", b"x")
            assert lab.refusal("Full")[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        eventually(lambda: of_calls() <= before, "none of them is kept")
    finally:
        gc.enable()
