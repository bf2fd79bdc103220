"""What people and their tools see of a running server: metrics, health, and both over HTTP.

Everything here is told or asks through callables that are passed in; nothing here knows what a
model, a reconciler or a gRPC server is, and nothing here changes what they do.
"""

from splitlearn_manager.monitoring.health import HealthChecker
from splitlearn_manager.monitoring.http import MonitoringServer
from splitlearn_manager.monitoring.metrics import MetricsCollector

__all__ = ["HealthChecker", "MetricsCollector", "MonitoringServer"]
