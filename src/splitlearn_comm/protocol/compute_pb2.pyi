from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StreamedRequest(_message.Message):
    __slots__ = ("request", "id", "timeout_s")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    request: ComputeRequest
    id: int
    timeout_s: float
    def __init__(self, request: _Optional[_Union[ComputeRequest, _Mapping]] = ..., id: _Optional[int] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class StreamedResponse(_message.Message):
    __slots__ = ("response", "refusal", "id", "version")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    response: ComputeResponse
    refusal: Refusal
    id: int
    version: str
    def __init__(self, response: _Optional[_Union[ComputeResponse, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., id: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class KVCacheEntry(_message.Message):
    __slots__ = ("key_data", "key_shape", "value_data", "value_shape")
    KEY_DATA_FIELD_NUMBER: _ClassVar[int]
    KEY_SHAPE_FIELD_NUMBER: _ClassVar[int]
    VALUE_DATA_FIELD_NUMBER: _ClassVar[int]
    VALUE_SHAPE_FIELD_NUMBER: _ClassVar[int]
    key_data: bytes
    key_shape: _containers.RepeatedScalarFieldContainer[int]
    value_data: bytes
    value_shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, key_data: _Optional[bytes] = ..., key_shape: _Optional[_Iterable[int]] = ..., value_data: _Optional[bytes] = ..., value_shape: _Optional[_Iterable[int]] = ...) -> None: ...

class ComputeRequest(_message.Message):
    __slots__ = ("data", "shape", "request_id", "metadata", "model_id", "forward_id", "training_mode", "past_key_values", "use_cache")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    FORWARD_ID_FIELD_NUMBER: _ClassVar[int]
    TRAINING_MODE_FIELD_NUMBER: _ClassVar[int]
    PAST_KEY_VALUES_FIELD_NUMBER: _ClassVar[int]
    USE_CACHE_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    shape: _containers.RepeatedScalarFieldContainer[int]
    request_id: int
    metadata: _containers.ScalarMap[str, str]
    model_id: str
    forward_id: str
    training_mode: bool
    past_key_values: _containers.RepeatedCompositeFieldContainer[KVCacheEntry]
    use_cache: bool
    def __init__(self, data: _Optional[bytes] = ..., shape: _Optional[_Iterable[int]] = ..., request_id: _Optional[int] = ..., metadata: _Optional[_Mapping[str, str]] = ..., model_id: _Optional[str] = ..., forward_id: _Optional[str] = ..., training_mode: bool = ..., past_key_values: _Optional[_Iterable[_Union[KVCacheEntry, _Mapping]]] = ..., use_cache: bool = ...) -> None: ...

class ComputeResponse(_message.Message):
    __slots__ = ("data", "shape", "request_id", "compute_time_ms", "monitoring_data", "forward_id", "present_key_values", "shared_bytes")
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    MONITORING_DATA_FIELD_NUMBER: _ClassVar[int]
    FORWARD_ID_FIELD_NUMBER: _ClassVar[int]
    PRESENT_KEY_VALUES_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    shape: _containers.RepeatedScalarFieldContainer[int]
    request_id: int
    compute_time_ms: float
    monitoring_data: MonitoringSnapshot
    forward_id: str
    present_key_values: _containers.RepeatedCompositeFieldContainer[KVCacheEntry]
    shared_bytes: int
    def __init__(self, data: _Optional[bytes] = ..., shape: _Optional[_Iterable[int]] = ..., request_id: _Optional[int] = ..., compute_time_ms: _Optional[float] = ..., monitoring_data: _Optional[_Union[MonitoringSnapshot, _Mapping]] = ..., forward_id: _Optional[str] = ..., present_key_values: _Optional[_Iterable[_Union[KVCacheEntry, _Mapping]]] = ..., shared_bytes: _Optional[int] = ...) -> None: ...

class MonitoringSnapshot(_message.Message):
    __slots__ = ("timestamp", "cpu_percent", "memory_mb", "memory_percent", "gpu_available", "gpu_utilization", "gpu_memory_used_mb", "gpu_memory_total_mb")
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    CPU_PERCENT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_MB_FIELD_NUMBER: _ClassVar[int]
    MEMORY_PERCENT_FIELD_NUMBER: _ClassVar[int]
    GPU_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    GPU_UTILIZATION_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_USED_MB_FIELD_NUMBER: _ClassVar[int]
    GPU_MEMORY_TOTAL_MB_FIELD_NUMBER: _ClassVar[int]
    timestamp: float
    cpu_percent: float
    memory_mb: float
    memory_percent: float
    gpu_available: bool
    gpu_utilization: float
    gpu_memory_used_mb: float
    gpu_memory_total_mb: float
    def __init__(self, timestamp: _Optional[float] = ..., cpu_percent: _Optional[float] = ..., memory_mb: _Optional[float] = ..., memory_percent: _Optional[float] = ..., gpu_available: bool = ..., gpu_utilization: _Optional[float] = ..., gpu_memory_used_mb: _Optional[float] = ..., gpu_memory_total_mb: _Optional[float] = ...) -> None: ...

class MonitoringStreamRequest(_message.Message):
    __slots__ = ("sampling_interval",)
    SAMPLING_INTERVAL_FIELD_NUMBER: _ClassVar[int]
    sampling_interval: float
    def __init__(self, sampling_interval: _Optional[float] = ...) -> None: ...

class MonitoringSnapshotResponse(_message.Message):
    __slots__ = ("snapshot",)
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    snapshot: MonitoringSnapshot
    def __init__(self, snapshot: _Optional[_Union[MonitoringSnapshot, _Mapping]] = ...) -> None: ...

class HealthRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HealthResponse(_message.Message):
    __slots__ = ("status", "message", "version", "uptime_seconds")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    status: str
    message: str
    version: str
    uptime_seconds: float
    def __init__(self, status: _Optional[str] = ..., message: _Optional[str] = ..., version: _Optional[str] = ..., uptime_seconds: _Optional[float] = ...) -> None: ...

class ServiceInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServiceInfoResponse(_message.Message):
    __slots__ = ("service_name", "version", "device", "uptime_seconds", "total_requests", "custom_info")
    class CustomInfoEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SERVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    CUSTOM_INFO_FIELD_NUMBER: _ClassVar[int]
    service_name: str
    version: str
    device: str
    uptime_seconds: float
    total_requests: int
    custom_info: _containers.ScalarMap[str, str]
    def __init__(self, service_name: _Optional[str] = ..., version: _Optional[str] = ..., device: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., total_requests: _Optional[int] = ..., custom_info: _Optional[_Mapping[str, str]] = ...) -> None: ...

class BackwardRequest(_message.Message):
    __slots__ = ("grad_output_data", "grad_output_shape", "forward_id", "model_id", "learning_rate", "accumulation_step")
    GRAD_OUTPUT_DATA_FIELD_NUMBER: _ClassVar[int]
    GRAD_OUTPUT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    FORWARD_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    ACCUMULATION_STEP_FIELD_NUMBER: _ClassVar[int]
    grad_output_data: bytes
    grad_output_shape: _containers.RepeatedScalarFieldContainer[int]
    forward_id: str
    model_id: str
    learning_rate: float
    accumulation_step: int
    def __init__(self, grad_output_data: _Optional[bytes] = ..., grad_output_shape: _Optional[_Iterable[int]] = ..., forward_id: _Optional[str] = ..., model_id: _Optional[str] = ..., learning_rate: _Optional[float] = ..., accumulation_step: _Optional[int] = ...) -> None: ...

class BackwardResponse(_message.Message):
    __slots__ = ("grad_input_data", "grad_input_shape", "forward_id", "backward_time_ms", "monitoring_data")
    GRAD_INPUT_DATA_FIELD_NUMBER: _ClassVar[int]
    GRAD_INPUT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    FORWARD_ID_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    MONITORING_DATA_FIELD_NUMBER: _ClassVar[int]
    grad_input_data: bytes
    grad_input_shape: _containers.RepeatedScalarFieldContainer[int]
    forward_id: str
    backward_time_ms: float
    monitoring_data: MonitoringSnapshot
    def __init__(self, grad_input_data: _Optional[bytes] = ..., grad_input_shape: _Optional[_Iterable[int]] = ..., forward_id: _Optional[str] = ..., backward_time_ms: _Optional[float] = ..., monitoring_data: _Optional[_Union[MonitoringSnapshot, _Mapping]] = ...) -> None: ...
