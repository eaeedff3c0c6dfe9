"""The session manager with a store: memory is a cache of the sessions in the store."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from mcp.server.streamable_http_manager import DEFAULT_MAX_REQUEST_BODY_SIZE
from mcp.server.transport_security import TransportSecurityMiddleware

from mcp_session_store import telemetry
from mcp_session_store.adapter import sdk
from mcp_session_store.adapter.arguments import check_options, check_stores
from mcp_session_store.adapter.background import run_again, run_every
from mcp_session_store.adapter.draining import Drain
from mcp_session_store.adapter.gauges import Gauges
from mcp_session_store.adapter.instances import Instances, instance_id
from mcp_session_store.adapter.outage import Gate
from mcp_session_store.adapter.question_ids import QuestionIds
from mcp_session_store.adapter.readiness import FINAL, Readiness
from mcp_session_store.adapter.relay.relay import Relay, named_notifications
from mcp_session_store.adapter.replay.journal import Journal
from mcp_session_store.adapter.replay.serving import serve
from mcp_session_store.adapter.requests import BodyLimit
from mcp_session_store.adapter.routing import Router
from mcp_session_store.adapter.session_log import SessionLog
from mcp_session_store.adapter.sessionless import SessionlessRequests
from mcp_session_store.adapter.sessions import middleware
from mcp_session_store.adapter.sessions.absences import Absences
from mcp_session_store.adapter.sessions.activity import ActivityReporter, checked_interval
from mcp_session_store.adapter.sessions.admission import Admission
from mcp_session_store.adapter.sessions.changes import TICKS
from mcp_session_store.adapter.sessions.departures import LOOK_INTERVAL, Departures
from mcp_session_store.adapter.sessions.ending import Ender, EndHook
from mcp_session_store.adapter.sessions.lifetime import set_idle
from mcp_session_store.adapter.sessions.lookup import Lookup
from mcp_session_store.adapter.sessions.opening import Opener
from mcp_session_store.adapter.sessions.patient_store import PatientStore
from mcp_session_store.adapter.sessions.recording import RecordWriter
from mcp_session_store.adapter.sessions.refreshing import Refresher
from mcp_session_store.adapter.sessions.registry import Registry
from mcp_session_store.adapter.sessions.restoring import RestoreHook, Restorer
from mcp_session_store.adapter.sessions.state import StateAccess
from mcp_session_store.adapter.stopping import close, retire, shut_down
from mcp_session_store.adapter.streams.followers import Followers
from mcp_session_store.adapter.streams.recorder import EventRecorder
from mcp_session_store.adapter.sweeping import sweeps
from mcp_session_store.errors import ConfigurationError, StoreUnavailable
from mcp_session_store.settings import NOT_GIVEN, InstanceSettings, NotGiven

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from fastmcp import FastMCP
    from mcp.server.lowlevel.server import Server
    from mcp.server.mcpserver import MCPServer
    from mcp.server.streamable_http import EventStore
    from mcp.server.transport_security import TransportSecuritySettings

    from mcp_session_store.adapter.replay.journal import JournaledMethod
    from mcp_session_store.event_log import EventLog
    from mcp_session_store.mailbox import Mailbox
    from mcp_session_store.state_store import StateStore
    from mcp_session_store.store import SessionStore

__all__ = ["DurableSessionManager", "EndHook", "RestoreHook"]


class DurableSessionManager(sdk.ManagerSeams):
    """A `StreamableHTTPSessionManager` whose sessions live in a store.

    A session that is not in memory is restored from its record, by replaying the client's
    handshake; a session that is in memory waits for no query. The restored session goes by the same
    id, to the same principal, and the application finds a `SessionRestoreMarker` in its contexts.

    Args:
        app: An `MCPServer`, a low-level `Server`, or a FastMCP 4 server.
        store: Store that keeps the sessions. The manager opens it when it starts to run. A store that
            cannot be reached then stops nothing: requests that need it are refused for now.
        event_store: As for the SDK's manager; not with `event_log`.
        event_log: Log that keeps the events of streams, so that a client that lost its connection gets what it missed,
            on any instance. The manager opens it when it starts to run. Without one no stream can be resumed.
        mailbox: Mailbox by which the instances that share the store know of each other; needed with `event_log`. The
            manager opens it when it starts to run.
        state_store: Store of the sessions' state, for `get_session_state`. The manager opens it when it starts to run.
        relay: Whether messages of clients reach the instance that they are for, whichever they are posted to. `False`:
            the mailbox only shows which instances are running.
        json_response: As for the SDK's manager.
        stateless: Refused: a stateless server has no sessions to store.
        security_settings: As for the SDK's manager. A request is checked before a session is restored.
        retry_interval: As for the SDK's manager, in milliseconds.
        session_idle_timeout: Seconds after which an idle session ends, on all instances: when it is
            given, it is the idle time of the store's retention policy. `None`: never.
        max_request_body_size: As for the SDK's manager, in bytes.
        on_restore: Called with the marker and the record before the replay. It may raise
            `RestoreRefused`: the session ends, and the client gets 404; with `ends_session=False` only
            the request that began the restore does. Any other error, and a hook that takes longer than
            `replay_timeout`, fails the request, and the session stays.
        on_end: Called once with the record and the reason, in each instance in which the session is
            resident when it ends, wherever that was; not when a copy leaves memory. A session that expires
            because it was idle has no copy left as a rule, and then no hook is called for it.
        settings: The numbers of this process, for which the environment is not read. Each of them can be given by
            keyword instead.
        evict_after: See `InstanceSettings`; seconds.
        max_sessions: See `InstanceSettings`.
        end_within: See `InstanceSettings`; seconds.
        serve_unverified_for: See `InstanceSettings`; seconds.
        sweep_interval: See `InstanceSettings`; seconds.
        activity_interval: See `InstanceSettings`; seconds.
        instance_timeout: See `InstanceSettings`; seconds.
        replay_timeout: See `InstanceSettings`; seconds.
        outage_patience: See `InstanceSettings`; seconds.
        max_initialize_params: See `InstanceSettings`; bytes.
        journaled_methods: Methods of the application's own whose calls set state of their session: the calls are
            stored, and replayed in a restore, as those of `logging/setLevel` and `resources/subscribe` are.
        relayed_notifications: Notifications of the application's own that concern every copy of a session.
        close_store: Close the store when the manager stops.
        close_event_log: Close the event log when the manager stops, before the store.
        close_mailbox: Close the mailbox when the manager stops, before the store.
        close_state_store: Close the store of state when the manager stops, before the store.

    Raises:
        ConfigurationError: A value cannot work; the message names it.
    """

    def __init__(
        self,
        app: MCPServer[Any] | Server[Any] | FastMCP[Any],
        store: SessionStore,
        *,
        event_store: EventStore | None = None,
        event_log: EventLog | None = None,
        mailbox: Mailbox | None = None,
        state_store: StateStore | None = None,
        relay: bool = True,
        json_response: bool = False,
        stateless: bool = False,
        security_settings: TransportSecuritySettings | None = None,
        retry_interval: int | None = None,
        session_idle_timeout: float | Literal["policy"] | None = "policy",
        max_request_body_size: int = DEFAULT_MAX_REQUEST_BODY_SIZE,
        on_restore: RestoreHook | None = None,
        on_end: EndHook | None = None,
        settings: InstanceSettings | None = None,
        evict_after: float | NotGiven | None = NOT_GIVEN,
        max_sessions: int | NotGiven | None = NOT_GIVEN,
        end_within: float | NotGiven = NOT_GIVEN,
        serve_unverified_for: float | NotGiven | None = NOT_GIVEN,
        sweep_interval: float | NotGiven | None = NOT_GIVEN,
        activity_interval: float | NotGiven | None = NOT_GIVEN,
        instance_timeout: float | NotGiven = NOT_GIVEN,
        replay_timeout: float | NotGiven = NOT_GIVEN,
        outage_patience: float | NotGiven = NOT_GIVEN,
        max_initialize_params: int | NotGiven = NOT_GIVEN,
        journaled_methods: Sequence[JournaledMethod] = (),
        relayed_notifications: Sequence[str] = (),
        close_store: bool = False,
        close_event_log: bool = False,
        close_mailbox: bool = False,
        close_state_store: bool = False,
    ) -> None:
        if stateless:
            raise ConfigurationError(
                "a stateless server has no sessions to store; leave out stateless, or use the SDK's own manager"
            )
        check_stores(store, event_log, event_store, mailbox, state_store)
        check_options(
            relay=relay,
            json_response=json_response,
            security_settings=security_settings,
            retry_interval=retry_interval,
            max_request_body_size=max_request_body_size,
            on_restore=on_restore,
            on_end=on_end,
            journaled_methods=journaled_methods,
            close_store=close_store,
            close_event_log=close_event_log,
            close_mailbox=close_mailbox,
            close_state_store=close_state_store,
        )
        settings = InstanceSettings.given(
            settings,
            evict_after=evict_after,
            max_sessions=max_sessions,
            end_within=end_within,
            serve_unverified_for=serve_unverified_for,
            sweep_interval=sweep_interval,
            activity_interval=activity_interval,
            instance_timeout=instance_timeout,
            replay_timeout=replay_timeout,
            outage_patience=outage_patience,
            max_initialize_params=max_initialize_params,
        )
        if session_idle_timeout != "policy":
            set_idle(store, session_idle_timeout)
        try:
            super().__init__(
                sdk.underlying_server(app),
                event_store=event_store,
                json_response=json_response,
                security_settings=security_settings,
                retry_interval=retry_interval,
                # Copies are evicted here, and sessions expire in the store.
                session_idle_timeout=None,
                max_request_body_size=max_request_body_size,
                max_sessions=settings.max_sessions,
            )
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        self._sessionless = SessionlessRequests()
        self.asgi_app = BodyLimit(self._refuse_while_not_running, max_request_body_size, self._sessionless.serve)
        self.store = store
        self.event_log = event_log
        self.mailbox = mailbox
        self.state_store = state_store
        self.instance = ""
        """Id of this process; made when the manager starts to run, because processes fork before."""
        self.readiness: Final = Readiness(store.namespace)
        """Whether this process can serve."""
        self._on_restore = on_restore
        self._on_end = on_end
        self._settings = settings
        beside = [(event_log, close_event_log), (mailbox, close_mailbox), (state_store, close_state_store)]
        self._to_close = [one for one, closes in [(store, close_store), *beside] if closes and one is not None]
        self._relays = relay
        self._named = named_notifications(relayed_notifications)
        self._relay: Relay | None = None
        self._instances: Instances | None = None
        self._recorder: EventRecorder | None = None
        self._journal = Journal(journaled_methods)
        middleware.install(self.app)
        checked_interval(settings.activity_interval, store.retention)
        self._tasks = sdk.ManagerTasks(self)
        self._log = SessionLog(store.namespace)
        transports, owners = sdk.transports_of(self), sdk.owners_of(self)
        self._registry = Registry(transports, owners, self._tasks, self._log, capacity=settings.max_sessions)
        self._evict_transport = self._registry.evict_transport

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Serve sessions while the context is open; once for each manager, as the SDK's.

        When the context closes, the resident sessions leave memory. No session ends by it.

        Raises:
            StoreMisconfigured: The database cannot be used as it is set up; the message says what to change.
            SchemaError: The schema does not fit; the message names the command to run.
        """
        self.instance = self._log.instance = instance_id()
        middleware.install(self.app)
        async with contextlib.AsyncExitStack() as stack:
            for store in self._to_close:
                stack.push_async_callback(close, store)
            self._wire()
            # Start watching before serving, so that no end is missed.
            first = [self._ender.changes.poll]
            if self._instances is not None:
                # Before a client can wait for any call that runs here.
                first.append(self._instances.beat)
            await self.readiness.ask(self.store, *first)
            if self._instances is not None:
                stack.push_async_callback(retire, self._instances, self._recorder, self.store.namespace)
            async with super().run():
                stack.enter_context(telemetry.observing(self._gauges))
                self._start_background_tasks()
                try:
                    yield
                    await self._drain.over()
                finally:
                    self.answer_waiting()
                    await shut_down(self._registry, self._activity, self._instances, self._relay)

    def answer_waiting(self) -> None:
        """Answer the requests that wait for the store, and let none wait from now on, because the server is to stop.

        A manager that stops does this by itself. A server that first waits for its requests to end, as uvicorn does,
        calls this before, or waits for their patience.
        """
        self.readiness.stop()
        self._gate.shut_down()

    def _wire(self) -> None:
        """Make the collaborators that need the event loop, the instance's id and the policy as it is now."""
        question_ids = QuestionIds()
        if self.mailbox is not None:
            self._instances = Instances(
                self.mailbox,
                question_ids,
                self._registry,
                instance=self.instance,
                server=self.app.name,
                dead_after=timedelta(seconds=self._settings.instance_timeout),
                relay=self._relays,
            )
            if self.event_log is not None:
                followers = Followers(self.event_log, self._instances)
                self._recorder = EventRecorder(self.event_log, followers, self._instances, self._log)
        # Another app may share the store, and have set its policy.
        interval = checked_interval(self._settings.activity_interval, self.store.retention)
        evict_after = self._settings.evict_after
        self._activity = ActivityReporter(
            self.store, self._registry, instance=self.instance, interval=interval, evict_after=evict_after
        )
        self._gate = Gate(self._tasks, self.readiness, patience=self._settings.outage_patience)
        self._gauges = Gauges(self.readiness, self._registry, self._gate)
        patient = PatientStore(self.store, self._gate)
        lookup = Lookup(patient, end_within=self._settings.end_within)
        self._ender = Ender(
            patient,
            self._registry,
            lookup,
            self._activity,
            self._tasks,
            on_end=self._on_end,
            end_within=self._settings.end_within,
            serve_unverified_for=self._settings.serve_unverified_for,
        )
        self._absences = Absences(self.store, self._registry, self._ender, self._activity, self._tasks, self._settings)
        writer = RecordWriter(
            patient,
            self._registry,
            StateAccess(self.state_store, self._gate),
            self._journal,
            self._ender.end_not_live,
            self._activity.first_used,
            instance=self.instance,
            max_initialize_params=self._settings.max_initialize_params,
        )
        refresher = Refresher(self._registry, writer, self._tasks, self._settings.replay_timeout)
        if self._relays and self._instances is not None:
            self._relay = Relay(
                self._instances,
                self._registry,
                lookup,
                self._activity,
                self._ender.changes,
                writer,
                refresher,
                self._gate,
                self._tasks,
                json_response=self.json_response,
                max_body=self.max_request_body_size,
                named=self._named,
                recorder=self._recorder,
                has_event_store=self.event_store is not None,
            )
        admission = Admission(
            self._registry,
            partial(sdk.make_transport, self),
            partial(serve, self),
            question_ids,
            self._recorder,
            retry_interval=self.retry_interval,
            relay=self._relay,
        )
        self._departures = Departures(self._tasks) if self.json_response else None
        opener = Opener(self._registry, admission, writer, self._tasks, departures=self._departures)
        self._restorer = Restorer(
            patient,
            self._registry,
            lookup,
            admission,
            self._activity,
            self._ender.changes,
            self._tasks,
            on_restore=self._on_restore,
            replay_timeout=self._settings.replay_timeout,
            loads_newest_event=self.event_log is not None and self.event_log.is_of(self.store),
        )
        router = Router(
            self._registry,
            opener,
            self._restorer,
            self._ender,
            self._activity,
            writer,
            TransportSecurityMiddleware(self.security_settings),
            has_event_store=self.event_store is not None,
            max_body=self.max_request_body_size,
            departures=self._departures,
            relay=self._relay,
        )
        self._serve_sessions_by(router.serve)

    def _start_background_tasks(self) -> None:
        start, settings, changes, absences = self._tasks.start_soon, self._settings, self._ender.changes, self._absences
        every = partial(run_every, readiness=self.readiness)
        again = partial(run_again, readiness=self.readiness)
        self.readiness.look = changes.wake.set
        start(partial(every, "activity", self._activity.interval, self._ender.report, wake=self._activity.wake))
        start(partial(every, "changes", settings.end_within / 2, self._poll_changes, wake=changes.wake))
        start(every, "pauses", settings.end_within / TICKS, changes.tick)
        start(again, "hints", changes.listen)
        start(every, "restores", settings.replay_timeout, self._restorer.fail_overdue)
        start(partial(every, "eviction", absences.interval, absences.evict_unused, max_backoff=absences.interval))
        followers = None if self._recorder is None else self._recorder.followers
        self._drain = Drain(self.app, self._registry, self._sessionless, followers, self.answer_waiting)
        start(again, "stop", self._drain.run)
        if self._departures is not None:
            start(every, "departures", LOOK_INTERVAL, self._departures.look)
        if settings.sweep_interval is not None:
            for name, sweep in sweeps(self._ender, self._instances, self.event_log, self.state_store):
                start(every, name, settings.sweep_interval, sweep)
        if self._instances is not None:
            start(self._instances.run, self.readiness)
        if self._relay is not None:
            start(self._relay.run, self.readiness)
        if self._recorder is not None:
            start(self._recorder.run, self.readiness)

    async def _poll_changes(self) -> None:
        try:
            await self._ender.changes.poll()
        except (StoreUnavailable, *FINAL) as error:
            self.readiness.failed(error)
            raise
        self._gate.store_answered()
