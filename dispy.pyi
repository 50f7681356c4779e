# Types of dispy, for type checkers and editors; Python itself does not read this file. See "Type
# checkers" in examples/README.md. What things mean is said in dispy.py, in the same order.
#
# JobCluster[P, R]: P are the parameters of the function, R is what it returns. Both are Any for a
# program: if the constructor had a form for each, checkers would say less of a wrong parameter.

import concurrent.futures
import logging
import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from types import ModuleType, TracebackType
from typing import Any, Generic, NamedTuple, Protocol, TypedDict, overload, type_check_only

from _typeshed import SupportsWrite
from typing_extensions import Never, ParamSpec, Self, TypeAlias, TypeVar, Unpack

from dispynode import DispyError as DispyError
from dispynode import Listed
from dispynode import SecretError as SecretError
from dispynode import __version__ as __version__

__all__ = [
    'JobCluster', 'SharedJobCluster', 'recover_jobs', 'fault_recover_jobs', 'NothingToRecover',
    'recoverable', 'Recoverable', 'NodeAllocate', 'DispyExecutor', 'register_joblib', 'DispyJob',
    'ValueRef', 'JobFailed', 'WorkerLost', 'RemoteTraceback', 'DispyNode', 'DispyNodeAvailInfo',
    'ClusterStatus', 'NoNodes', 'DispyError', 'SecretError', 'logger']

# A name without parameters, as in `def show(job: DispyJob)`, means a job of any function.
_P = ParamSpec('_P', default=...)
_R = TypeVar('_R', default=Any)
_R_co = TypeVar('_R_co', covariant=True, default=Any)
_P2 = ParamSpec('_P2')
_T = TypeVar('_T')
_A = TypeVar('_A')
_B = TypeVar('_B')
_C = TypeVar('_C')
_F_co = TypeVar('_F_co', covariant=True)

_Path: TypeAlias = str | os.PathLike[str]
# A list, and no single path or function.
_Several: TypeAlias = list[Any] | tuple[Any, ...] | set[Any]
_Secret: TypeAlias = str | bytes
# An element of `nodes`.
_NodeSpec: TypeAlias = (
    str | tuple[str, int | None] | tuple[str, int | None, int | None] | dict[str, Any]
    | DispyNode | NodeAllocate)
_Nodes: TypeAlias = _NodeSpec | Iterable[_NodeSpec]
# A node that the cluster knows.
_NodeName: TypeAlias = DispyNode | str | tuple[str, int]
_OwnAddress: TypeAlias = str | list[str] | tuple[str, int]
_ClusterStatusCallback: TypeAlias = Callable[[int, DispyNode | None, DispyJob[Any] | None], object]
# With DispyJob[_R], a function for any job would make the results of the whole cluster Any.
_JobCallback: TypeAlias = Callable[[DispyJob[Any]], object]
_OutputCallback: TypeAlias = Callable[[DispyJob[Any], str, Any], object]
_RetryOn: TypeAlias = (
    bool | type[BaseException] | tuple[type[BaseException], ...] | list[type[BaseException]])

@type_check_only
class _Logger(logging.Logger):
    DEBUG: int
    INFO: int
    WARN: int
    WARNING: int
    ERROR: int
    CRITICAL: int
    FATAL: int

logger: _Logger

class NothingToRecover(DispyError, FileNotFoundError): ...
class NoNodes(DispyError): ...
class JobFailed(DispyError): ...
class WorkerLost(JobFailed, BrokenProcessPool): ...

class RemoteTraceback(DispyError):
    @property
    def tb(self) -> str: ...

class DispyJob(Generic[_R_co]):
    Created: int
    Running: int
    ProvisionalResult: int
    Cancelled: int
    Terminated: int
    Abandoned: int
    Finished: int
    arguments: str
    id: Any
    status: int
    # "| Any" stands for None, and for a provisional result, which may be anything: that depends on
    # the status, which no type can say.
    result: _R_co | Any
    ip_addr: str | Any
    submit_time: float
    start_time: float | Any
    end_time: float | Any
    # str for functions, bytes for programs, None before the end.
    stdout: Any
    stderr: Any
    def __init__(self, comp: Any, payload: Any, options: Any, number: Any = ...) -> None: ...
    @classmethod
    def __class_getitem__(cls, item: Any, /) -> Any: ...
    @property
    def exception(self) -> str | Any: ...
    @exception.setter
    def exception(self, text: str | None) -> None: ...
    @property
    def error(self) -> BaseException | Any: ...
    @error.setter
    def error(self, error: BaseException | None) -> None: ...
    @property
    def finish(self) -> threading.Event: ...
    def wait(self, timeout: float | None = None) -> bool: ...
    # None for a job that failed; `get` raises then.
    def __call__(self, timeout: float | None = None, clear: bool = False) -> _R_co | None: ...
    def get(self, timeout: float | None = None) -> _R_co: ...
    def __await__(self) -> Generator[Any, Any, _R_co]: ...
    @property
    def args(self) -> Any: ...
    @property
    def kwargs(self) -> Any: ...
    def status_text(self) -> str: ...
    def __lt__(self, other: Any) -> bool: ...
    def _repr_html_(self) -> str: ...

class _AvailInfo(NamedTuple):
    cpu: float | None = None
    memory: int | None = None
    disk: int | None = None
    swap: int | None = None

class DispyNodeAvailInfo(_AvailInfo, metaclass=Listed): ...

class DispyNode:
    Initialized: int
    Closed: int
    AvailInfo: int
    ip_addr: str
    port: int
    name: str
    state: str
    reason: str
    cpus: int
    avail_cpus: int
    busy: int
    jobs_done: int
    cpu_time: float
    tx: int
    rx: int
    update_time: float
    platform: str
    resources: dict[str, int]
    resources_used: dict[str, int]
    avail_info: DispyNodeAvailInfo | None
    facts: dict[str, Any]
    def __init__(
        self, ip_addr: str, name: str = '', cpus: int = 0, port: int = 9701, state: str = '',
        reason: str = '', avail_cpus: int | None = None, busy: int = 0, jobs_done: int = 0,
        cpu_time: float = 0.0, facts: dict[str, Any] | None = None) -> None: ...
    def _repr_html_(self) -> str: ...

class _NodesAndJobs(NamedTuple):
    nodes: list[DispyNode]
    jobs_pending: int

class ClusterStatus(_NodesAndJobs, metaclass=Listed):
    refused: list[DispyNode]
    def __new__(cls, nodes: Sequence[DispyNode], jobs_pending: int) -> Self: ...
    @property
    def all_nodes(self) -> list[DispyNode]: ...

class JobList(list[DispyJob[_R]]):
    def _repr_html_(self) -> str: ...

class ValueRef:
    def __init__(self, value: Any, labels: Iterable[tuple[str, Any]]) -> None: ...
    @property
    def size(self) -> int: ...
    def get(self) -> Any: ...

class NodeAllocate:
    host: str
    port: int | None
    cpus: int
    depends: list[Any]
    setup_args: Sequence[Any]
    def __init__(
        self, host: str, port: int | None = None, cpus: int = 0, depends: _Several = (),
        setup_args: Sequence[Any] = ()) -> None: ...
    @property
    def ip_addr(self) -> str | None: ...
    @ip_addr.setter
    def ip_addr(self, address: str | None) -> None: ...
    def allocate(
        self, cluster: JobCluster[..., Any], ip_addr: str, name: str, cpus: int,
        avail_info: DispyNodeAvailInfo | None = None, platform: str = '') -> int: ...

class _RecoverableFields(NamedTuple):
    path: str
    name: str
    script: str
    host: str
    pid: int
    began: float
    code: str
    nodes: tuple[str, ...]
    jobs: int | None = None
    unreached: tuple[str, ...] = ()

class Recoverable(_RecoverableFields, metaclass=Listed):
    def __fspath__(self) -> str: ...

def recover_jobs(
    recover_file: _Path | None = None, timeout: float | None = None,
    terminate_pending: bool = False, secret: _Secret | None = None, certfile: _Path | None = None,
    keyfile: _Path | None = None, cafile: _Path | None = None) -> list[DispyJob[Any]]: ...

fault_recover_jobs = recover_jobs

def recoverable(
    timeout: float = 10.0, secret: _Secret | None = None, certfile: _Path | None = None,
    keyfile: _Path | None = None, cafile: _Path | None = None) -> list[Recoverable]: ...

config: ModuleType

class OldCluster:
    @property
    def start_time(self) -> float: ...
    @property
    def end_time(self) -> float | None: ...
    @property
    def cpu_time(self) -> float: ...
    @property
    def pulse_interval(self) -> float | None: ...
    @property
    def ping_interval(self) -> float | None: ...
    @property
    def poll_interval(self) -> float | None: ...
    @property
    def job_status(self) -> Any: ...
    @job_status.setter
    def job_status(self, function: Any) -> None: ...
    @property
    def cluster_status(self) -> Any: ...
    @cluster_status.setter
    def cluster_status(self, function: Any) -> None: ...

# What a cluster computes, for its `map`. A module has no such attribute.
@type_check_only
class _Computes(Protocol[_F_co]):
    @property
    def _computation(self) -> _F_co: ...

@type_check_only
class _OfFunction(Generic[_P, _R]):
    @property
    def _computation(self) -> Callable[_P, _R]: ...

class JobCluster(OldCluster, _OfFunction[_P, _R]):
    name: str
    recovered: list[DispyJob[_R]]
    @classmethod
    def __class_getitem__(cls, item: Any, /) -> Any: ...
    def __init__(
        self, computation: Callable[_P, _R] | _Path, nodes: _Nodes | None = None,
        depends: _Several = (), job_status: _JobCallback | None = None,
        cluster_status: _ClusterStatusCallback | None = None, host: _OwnAddress | None = None,
        dispy_port: int | None = None, *more: Never, ext_host: str | None = None,
        dest_path: str | None = None, loglevel: int | str = 20,
        setup: Callable[..., object] | None = None, cleanup: bool | Callable[..., object] = True,
        ping_interval: float | None = None, pulse_interval: float | None = None,
        reentrant: bool = False, secret: _Secret | None = None, keyfile: _Path | None = None,
        certfile: _Path | None = None, cafile: _Path | None = None,
        recover_file: bool | _Path | None = None, max_jobs_per_worker: int | None = None,
        on_output: _OutputCallback | None = None, forward_logs: bool = False,
        start_method: str | None = None, resources: Mapping[str, int] | None = None,
        python: str | None = None, job_dir: bool = False, returns: Sequence[str] = (),
        dest: str | None = None, speculate: bool = False,
        callback: _JobCallback | None = None, ip_addr: _OwnAddress | None = None,
        ext_ip_addr: str | None = None, fault_recover: bool | _Path | None = None,
        poll_interval: float | None = None, ipv4_udp_multicast: bool = False,
        node_port: int | None = None, port: int | None = None,
        client_port: int | None = None) -> None: ...
    # A call without keywords of dispy is checked against the function. No type says "its parameters
    # and these keywords", so that of another call one keyword is checked: there is a form for each.
    # dispy_retry_on and dispy_retry_delay come with dispy_retries.
    @overload
    def submit(self, /, *args: _P.args, **kwargs: _P.kwargs) -> DispyJob[_R]: ...
    @overload
    def submit(self, /, *args: Any, dispy_timeout: float | None, **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit(self, /, *args: Any, dispy_priority: int | None, **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit(self, /, *args: Any, dispy_cpus: int | None, **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit(self, /, *args: Any, dispy_memory: int | None, **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit(
        self, /, *args: Any, dispy_resources: Mapping[str, int] | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit(
        self, /, *args: Any, dispy_retries: int | None, dispy_retry_on: _RetryOn | None = None,
        dispy_retry_delay: float | None = None, **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit(self, /, *args: Any, dispy_job_depends: _Several, **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id(self, id: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> DispyJob[_R]: ...
    @overload
    def submit_job_id(
        self, id: Any, /, *args: Any, dispy_timeout: float | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id(
        self, id: Any, /, *args: Any, dispy_priority: int | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id(
        self, id: Any, /, *args: Any, dispy_cpus: int | None, **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id(
        self, id: Any, /, *args: Any, dispy_memory: int | None, **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id(
        self, id: Any, /, *args: Any, dispy_resources: Mapping[str, int] | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id(
        self, id: Any, /, *args: Any, dispy_retries: int | None,
        dispy_retry_on: _RetryOn | None = None, dispy_retry_delay: float | None = None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id(
        self, id: Any, /, *args: Any, dispy_job_depends: _Several,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_node(
        self, node: _NodeName, /, *args: _P.args, **kwargs: _P.kwargs) -> DispyJob[_R]: ...
    @overload
    def submit_node(
        self, node: _NodeName, /, *args: Any, dispy_timeout: float | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_node(
        self, node: _NodeName, /, *args: Any, dispy_priority: int | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_node(
        self, node: _NodeName, /, *args: Any, dispy_cpus: int | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_node(
        self, node: _NodeName, /, *args: Any, dispy_memory: int | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_node(
        self, node: _NodeName, /, *args: Any, dispy_resources: Mapping[str, int] | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_node(
        self, node: _NodeName, /, *args: Any, dispy_retries: int | None,
        dispy_retry_on: _RetryOn | None = None, dispy_retry_delay: float | None = None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_node(
        self, node: _NodeName, /, *args: Any, dispy_job_depends: _Several,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id_node(
        self, id: Any, node: _NodeName, /, *args: _P.args, **kwargs: _P.kwargs) -> DispyJob[_R]: ...
    @overload
    def submit_job_id_node(
        self, id: Any, node: _NodeName, /, *args: Any, dispy_timeout: float | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id_node(
        self, id: Any, node: _NodeName, /, *args: Any, dispy_priority: int | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id_node(
        self, id: Any, node: _NodeName, /, *args: Any, dispy_cpus: int | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id_node(
        self, id: Any, node: _NodeName, /, *args: Any, dispy_memory: int | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id_node(
        self, id: Any, node: _NodeName, /, *args: Any, dispy_resources: Mapping[str, int] | None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id_node(
        self, id: Any, node: _NodeName, /, *args: Any, dispy_retries: int | None,
        dispy_retry_on: _RetryOn | None = None, dispy_retry_delay: float | None = None,
        **kwargs: Any) -> DispyJob[_R]: ...
    @overload
    def submit_job_id_node(
        self, id: Any, node: _NodeName, /, *args: Any, dispy_job_depends: _Several,
        **kwargs: Any) -> DispyJob[_R]: ...
    # A ValueRef, which stands where the function takes the value: no other type than Any does both.
    def put(self, value: Any) -> Any: ...
    @overload
    def map(
        self: _Computes[Callable[[_A], _R]], a: Iterable[_A], /, *, in_flight: int | None = None,
        progress: bool = False) -> Generator[_R, None, None]: ...
    @overload
    def map(
        self: _Computes[Callable[[_A, _B], _R]], a: Iterable[_A], b: Iterable[_B], /, *,
        in_flight: int | None = None, progress: bool = False) -> Generator[_R, None, None]: ...
    @overload
    def map(
        self: _Computes[Callable[[_A, _B, _C], _R]], a: Iterable[_A], b: Iterable[_B],
        c: Iterable[_C], /, *, in_flight: int | None = None,
        progress: bool = False) -> Generator[_R, None, None]: ...
    @overload
    def map(
        self, a: Iterable[Any], b: Iterable[Any], c: Iterable[Any], d: Iterable[Any], /,
        *iterables: Iterable[Any], in_flight: int | None = None,
        progress: bool = False) -> Generator[_R, None, None]: ...
    def as_completed(
        self, jobs: Iterable[DispyJob[_T]], timeout: float | None = None,
        progress: bool = False) -> Generator[DispyJob[_T], None, None]: ...
    def gather(self, jobs: Iterable[DispyJob[_T]], timeout: float | None = None) -> list[_T]: ...
    def cancel(self, job: DispyJob[Any]) -> int: ...
    def jobs(self) -> JobList[_R]: ...
    def cancel_all(self) -> int: ...
    def cancel_waiting(self) -> None: ...
    def wait(self, timeout: float | None = None, progress: bool = False) -> bool: ...
    def __call__(self, timeout: float | None = None, progress: bool = False) -> bool: ...
    def wait_nodes(self, n: int = 1, timeout: float | None = None) -> None: ...
    def status(self) -> ClusterStatus: ...
    def discover_nodes(self, nodes: _Nodes) -> int: ...
    def allocate_node(self, node: _Nodes) -> int: ...
    def deallocate_node(self, node: _NodeName) -> int: ...
    def close_node(self, node: _NodeName, terminate_pending: bool = False) -> int: ...
    def resetup_node(self, node: _NodeName, terminate_pending: bool = False) -> int: ...
    def set_node_cpus(self, node: _NodeName, cpus: int) -> int: ...
    def node_jobs(self, node: _NodeName, from_node: bool = False) -> list[DispyJob[_R]]: ...
    def send_file(
        self, path: _Path, node: _NodeName, timeout: float | None = None,
        relay: bool | None = None) -> int: ...
    def print_status(
        self, wall_time: float | SupportsWrite[str] | None = None,
        file: SupportsWrite[str] | None = None) -> None: ...
    def stats(
        self, wall_time: float | SupportsWrite[str] | None = None,
        file: SupportsWrite[str] | None = None) -> None: ...
    def close(self, timeout: float | None = None, terminate: bool = False) -> bool: ...
    def shutdown(self, timeout: float | None = None, terminate: bool = False) -> bool: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None,
        trace: TracebackType | None) -> None: ...
    def _repr_html_(self) -> str: ...

# Parameters of JobCluster that are given by name only, for those who hand them on.
@type_check_only
class _ClusterOptions(TypedDict, total=False):
    ext_host: str | None
    dest_path: str | None
    loglevel: int | str
    setup: Callable[..., object] | None
    cleanup: bool | Callable[..., object]
    ping_interval: float | None
    pulse_interval: float | None
    reentrant: bool
    secret: _Secret | None
    keyfile: _Path | None
    certfile: _Path | None
    cafile: _Path | None
    recover_file: bool | _Path | None
    max_jobs_per_worker: int | None
    on_output: _OutputCallback | None
    forward_logs: bool
    start_method: str | None
    resources: Mapping[str, int] | None
    python: str | None
    job_dir: bool
    returns: Sequence[str]
    dest: str | None
    speculate: bool
    ip_addr: _OwnAddress | None
    ext_ip_addr: str | None
    fault_recover: bool | _Path | None
    poll_interval: float | None
    ipv4_udp_multicast: bool
    node_port: int | None
    port: int | None
    client_port: int | None

# Those, and others by name that an executor hands on.
@type_check_only
class _ExecutorOptions(_ClusterOptions, total=False):
    depends: _Several
    cluster_status: _ClusterStatusCallback | None
    host: _OwnAddress | None
    dispy_port: int | None

class SharedJobCluster(JobCluster[_P, _R]):
    def __init__(
        self, computation: Callable[_P, _R] | _Path, nodes: _Nodes | None = None,
        depends: _Several = (), job_status: _JobCallback | None = None,
        cluster_status: _ClusterStatusCallback | None = None, host: _OwnAddress | None = None,
        dispy_port: int | None = None, *, scheduler_host: str | None = None,
        scheduler_port: int | None = None, exclusive: bool = False,
        scheduler_node: str | None = None, callback: _JobCallback | None = None,
        **options: Unpack[_ClusterOptions]) -> None: ...

class DispyFuture(concurrent.futures.Future[_R]):
    job: DispyJob[_R] | None
    @classmethod
    def __class_getitem__(cls, item: Any, /) -> Any: ...
    def __init__(self, cluster: JobCluster[..., Any]) -> None: ...
    def settle(self, job: DispyJob[Any]) -> None: ...

class DispyExecutor(concurrent.futures.Executor):
    def __init__(
        self, max_workers: int | None = None, mp_context: Any = None,
        initializer: Callable[..., object] | None = None, initargs: Sequence[Any] = (), *,
        max_tasks_per_child: int | None = None, nodes: _Nodes | None = None,
        **options: Unpack[_ExecutorOptions]) -> None: ...
    @property
    def cluster(self) -> JobCluster[..., Any]: ...
    def with_options(
        self, *, timeout: float | None = None, priority: int | None = None,
        memory: int | None = None, cpus: int | None = None, retries: int | None = None,
        resources: Mapping[str, int] | None = None) -> Self: ...
    if sys.version_info >= (3, 9):
        def submit(
            self, fn: Callable[_P2, _T], /, *args: _P2.args,
            **kwargs: _P2.kwargs) -> DispyFuture[_T]: ...
    else:   # as in the standard library of Python 3.8
        def submit(
            self, fn: Callable[_P2, _T], *args: _P2.args,
            **kwargs: _P2.kwargs) -> DispyFuture[_T]: ...
    # An executor of the standard library takes any iterables here.
    @overload  # type: ignore[override]
    def map(
        self, fn: Callable[[_A], _T], a: Iterable[_A], *, timeout: float | None = None,
        chunksize: int = 1, buffersize: int | None = None,
        progress: bool = False) -> Iterator[_T]: ...
    @overload
    def map(
        self, fn: Callable[[_A, _B], _T], a: Iterable[_A], b: Iterable[_B], *,
        timeout: float | None = None, chunksize: int = 1, buffersize: int | None = None,
        progress: bool = False) -> Iterator[_T]: ...
    @overload
    def map(
        self, fn: Callable[[_A, _B, _C], _T], a: Iterable[_A], b: Iterable[_B], c: Iterable[_C], *,
        timeout: float | None = None, chunksize: int = 1, buffersize: int | None = None,
        progress: bool = False) -> Iterator[_T]: ...
    @overload
    def map(
        self, fn: Callable[..., _T], a: Iterable[Any], b: Iterable[Any], c: Iterable[Any],
        d: Iterable[Any], *iterables: Iterable[Any], timeout: float | None = None,
        chunksize: int = 1, buffersize: int | None = None,
        progress: bool = False) -> Iterator[_T]: ...
    def __exit__(self, kind: Any, value: Any, trace: Any) -> None: ...
    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None: ...

@type_check_only
class _JoblibClusters:
    def close(self) -> None: ...

joblib_clusters: _JoblibClusters

def register_joblib() -> None: ...
def main(argv: Sequence[str] | None = None) -> int: ...

# Names that a job has on its node, for `if TYPE_CHECKING: from dispy import ...`; the module itself
# does not have them.
dispy_node_name: str
dispy_node_ip_addr: str
dispy_job_path: str
def dispy_provisional_result(result: Any, relay: Any = None, timeout: Any = None) -> int: ...
def dispy_send_file(path: str, relay: Any = None, timeout: Any = None) -> int: ...
