"""The wire of version 1.0 is frozen: its facts are written out again here, apart from the .proto file."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import FieldDescriptor

from splitlearn_comm.protocol import compute_pb2

# number name type, as `opt` (has presence), `rep` (repeated) or plain.
MESSAGES = {
    "KVCacheEntry": """
        1 key_data bytes
        2 key_shape rep int32
        3 value_data bytes
        4 value_shape rep int32""",
    "ComputeRequest": """
        1 data bytes
        2 shape rep int32
        3 request_id opt int32
        4 metadata map string string
        5 model_id string
        6 forward_id opt string
        7 training_mode opt bool
        8 past_key_values rep KVCacheEntry
        9 use_cache opt bool""",
    "ComputeResponse": """
        1 data bytes
        2 shape rep int32
        3 request_id opt int32
        4 compute_time_ms opt float
        5 monitoring_data opt MonitoringSnapshot
        6 forward_id opt string
        7 present_key_values rep KVCacheEntry""",
    "MonitoringSnapshot": """
        1 timestamp double
        2 cpu_percent float
        3 memory_mb float
        4 memory_percent float
        5 gpu_available bool
        6 gpu_utilization opt float
        7 gpu_memory_used_mb opt float
        8 gpu_memory_total_mb opt float""",
    "MonitoringStreamRequest": """
        1 sampling_interval opt double""",
    "MonitoringSnapshotResponse": """
        1 snapshot opt MonitoringSnapshot""",
    "HealthRequest": "",
    "HealthResponse": """
        1 status string
        2 message string
        3 version string
        4 uptime_seconds opt float""",
    "ServiceInfoRequest": "",
    "ServiceInfoResponse": """
        1 service_name string
        2 version string
        3 device string
        4 uptime_seconds opt float
        5 total_requests int64
        6 custom_info map string string""",
    "BackwardRequest": """
        1 grad_output_data bytes
        2 grad_output_shape rep int32
        3 forward_id string
        4 model_id opt string
        5 learning_rate opt float
        6 accumulation_step opt int32""",
    "BackwardResponse": """
        1 grad_input_data bytes
        2 grad_input_shape rep int32
        3 forward_id string
        4 backward_time_ms opt float
        5 monitoring_data opt MonitoringSnapshot""",
}
RPCS = {
    "Compute": ("ComputeRequest", "ComputeResponse", False),
    "ComputeBackward": ("BackwardRequest", "BackwardResponse", False),
    "HealthCheck": ("HealthRequest", "HealthResponse", False),
    "GetServiceInfo": ("ServiceInfoRequest", "ServiceInfoResponse", False),
    "StreamMonitoring": ("MonitoringStreamRequest", "MonitoringSnapshotResponse", True),
}
SCALARS = {
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_BOOL: "bool",
}


def described(field: FieldDescriptor) -> str:
    message = field.message_type
    if message is not None and message.GetOptions().map_entry:
        kinds = " ".join(SCALARS[part.type] for part in message.fields)
        return f"{field.number} {field.name} map {kinds}"
    kind = SCALARS[field.type] if message is None else message.name
    presence = "rep " if field.is_repeated else "opt " if field.has_presence else ""
    return f"{field.number} {field.name} {presence}{kind}"


@pytest.mark.parametrize("name", MESSAGES)
def test_message_has_exactly_the_fields_of_version_one(name: str) -> None:
    message = compute_pb2.DESCRIPTOR.message_types_by_name[name]
    wanted = [line.strip() for line in MESSAGES[name].splitlines() if line.strip()]
    fields = [described(field) for field in message.fields]
    assert [f for f in fields if f not in OUR_FIELDS.get(name, ())] == wanted


OUR_FIELDS = {"ComputeResponse": ("16 shared_bytes opt int64",)}
"""Only in answers to requests that asked for it; peers of version 1.0 skip what they do not know."""

OURS = {"StreamedRequest", "StreamedResponse", "Refusal"}
"""Messages of `ComputeStream`, which version 1.0 does not have."""


def test_there_are_no_other_messages_but_those_of_streams() -> None:
    assert set(compute_pb2.DESCRIPTOR.message_types_by_name) == set(MESSAGES) | OURS


def test_service_has_the_rpcs_of_version_one_and_the_stream() -> None:
    service = compute_pb2.DESCRIPTOR.services_by_name["ComputeService"]
    assert service.full_name == "splitlearn.comm.ComputeService"
    assert {
        method.name: (method.input_type.name, method.output_type.name, method.server_streaming)
        for method in service.methods
        if method.name != "ComputeStream"
    } == RPCS
    assert [m.name for m in service.methods if m.client_streaming] == ["ComputeStream"]


def test_file_is_proto3_in_the_package_that_peers_name() -> None:
    assert compute_pb2.DESCRIPTOR.package == "splitlearn.comm"
    from google.protobuf import descriptor_pb2

    file = descriptor_pb2.FileDescriptorProto()
    compute_pb2.DESCRIPTOR.CopyToProto(file)
    assert file.syntax == "proto3"
