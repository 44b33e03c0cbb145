"""What type checkers are told of `singleton_task`. Never imported when anything runs.

The function's own parameters stay on the task's ``__call__``, ``delay``, ``s`` and ``si``; an option that does not
exist is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypedDict, TypeVar, overload

from celery import Celery, Task
from celery.canvas import Signature
from celery.result import AsyncResult, EagerResult

from celery_etcd_lock.tasks.conflict import Conflict
from celery_etcd_lock.tasks.current import TaskLock

if TYPE_CHECKING:
    from typing_extensions import Unpack  # type checkers bring it; typing has it from Python 3.11 on

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Options(TypedDict, total=False):
    """Those of `SingletonTask`, and those of ``@app.task``."""

    unique_on: str | Sequence[str]
    lock_key: str | Callable[..., object]
    lock_mode: Literal["exclusive", "shared"]
    lock_limit: int
    unique_queued: Literal["until_start", "until_end"]
    on_duplicate: Literal["return", "raise"]
    on_conflict: Conflict | Literal["retry", "skip", "wait", "fail", "coalesce"]
    on_lost: Literal["abort", "retry", "warn"]
    on_unavailable: Literal["retry", "fail", "run"]
    lock_at_least_for: float
    lock_at_most_for: float | None

    app: Celery[Any]
    name: str
    base: type[Task[Any, Any]]
    serializer: str
    compression: str
    rate_limit: str | float | None
    priority: int
    queue: str
    expires: float | None
    time_limit: float
    soft_time_limit: float
    ignore_result: bool
    store_errors_even_if_ignored: bool
    track_started: bool
    acks_late: bool
    acks_on_failure_or_timeout: bool
    reject_on_worker_lost: bool
    max_retries: int | None
    default_retry_delay: float
    autoretry_for: tuple[type[BaseException], ...]
    dont_autoretry_for: tuple[type[BaseException], ...]
    retry_kwargs: Mapping[str, Any]
    retry_backoff: bool | int
    retry_backoff_max: int
    retry_jitter: bool
    throws: tuple[type[BaseException], ...]
    typing: bool
    send_events: bool
    resultrepr_maxsize: int
    pydantic: bool
    pydantic_strict: bool
    pydantic_context: Mapping[str, Any]
    pydantic_dump_kwargs: Mapping[str, Any]
    on_success: Callable[..., Any]
    on_failure: Callable[..., Any]
    on_retry: Callable[..., Any]
    before_start: Callable[..., Any]
    after_return: Callable[..., Any]


class SingletonTaskOf(Protocol[P, R_co]):
    """A singleton task made from a function of these parameters and this result."""

    __name__: str
    name: str
    app: Celery[Any]
    request: Any
    backend: Any
    max_retries: int | None
    acks_late: bool
    ignore_result: bool
    throws: tuple[type[BaseException], ...]

    @property
    def lock(self) -> TaskLock: ...
    def lock_name(self, args: Sequence[Any] = ..., kwargs: dict[str, Any] | None = ...) -> str: ...
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R_co]: ...
    def s(self, *args: P.args, **kwargs: P.kwargs) -> Signature[R_co]: ...
    def si(self, *args: P.args, **kwargs: P.kwargs) -> Signature[R_co]: ...
    def signature(
        self, args: Sequence[Any] = ..., kwargs: Mapping[str, Any] = ..., **options: Any
    ) -> Signature[R_co]: ...
    def apply(
        self, args: Sequence[Any] | None = ..., kwargs: Mapping[str, Any] | None = ..., **options: Any
    ) -> EagerResult[R_co]: ...
    def apply_async(
        self,
        args: Sequence[Any] | None = ...,
        kwargs: Mapping[str, Any] | None = ...,
        task_id: str | None = ...,
        producer: Any = ...,
        link: Any = ...,
        link_error: Any = ...,
        shadow: str | None = ...,
        **options: Any,
    ) -> AsyncResult[R_co]: ...


class Decorator(Protocol):
    """``@singleton_task(…)`` without ``bind``."""

    def __call__(self, function: Callable[P, R], /) -> SingletonTaskOf[P, R]: ...


class BoundDecorator(Protocol):
    """``@singleton_task(bind=True, …)``: the function's first parameter is the task."""

    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> SingletonTaskOf[P, R]: ...


class SingletonTaskDecorator(Protocol):
    """`singleton_task` itself."""

    @overload
    def __call__(self, function: Callable[P, R], /) -> SingletonTaskOf[P, R]: ...
    @overload
    def __call__(self, *, bind: Literal[False] = ..., **options: Unpack[Options]) -> Decorator: ...
    @overload
    def __call__(self, *, bind: Literal[True], **options: Unpack[Options]) -> BoundDecorator: ...
