"""Commits what a restore replays: handshakes and journaled calls."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from mcp_session_store import telemetry
from mcp_session_store.adapter import clock
from mcp_session_store.adapter.refusals import log_refusal, reason_of, refuse
from mcp_session_store.adapter.replay.journal import ElsewhereChange
from mcp_session_store.adapter.sessions.lookup import principal_of
from mcp_session_store.errors import JournalFull, NoSession, SessionStoreError
from mcp_session_store.records import NewSession, session_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping
    from typing import Any
    from uuid import UUID

    from mcp_session_store.adapter.outage import RequestWait
    from mcp_session_store.adapter.replay.journal import Journal, JournalWrite
    from mcp_session_store.adapter.sessions.handshake import InitializeParams
    from mcp_session_store.adapter.sessions.patient_store import PatientStore
    from mcp_session_store.adapter.sessions.registry import Registry
    from mcp_session_store.adapter.sessions.resident import ResidentSession
    from mcp_session_store.adapter.sessions.set_state import OwnCall
    from mcp_session_store.adapter.sessions.state import StateAccess
    from mcp_session_store.records import NewState, SessionRecord

__all__ = ["RECORD_WRITER", "RecordWriter"]

RECORD_WRITER: Final = "mcp_session_store.record_writer"
"""Key of a request's ASGI scope under which the writer of its session's record stands."""


class RecordWriter:
    """Writes what handshakes and journaled calls change in the records of resident sessions.

    Args:
        store: The store that keeps the records.
        registry: Registry in which a session is published when its record is committed.
        state: State of the sessions.
        journal: Rules that say which calls are stored, and as what.
        on_not_live: Called with the keys of sessions that turn out not to be live any more.
        on_first_use: Called with a session of which something is asked for the first time.
        instance: Id of this instance.
        max_initialize_params: Highest number of bytes of `initialize` params, as JSON, that are stored.
    """

    def __init__(
        self,
        store: PatientStore,
        registry: Registry,
        state: StateAccess,
        journal: Journal,
        on_not_live: Callable[[Collection[UUID]], Awaitable[None]],
        on_first_use: Callable[[ResidentSession], None],
        *,
        instance: str,
        max_initialize_params: int,
    ) -> None:
        self.store: Final = store
        self._registry = registry
        self.state: Final = state
        self.on_not_live: Final = on_not_live
        self.announce: Callable[[UUID, str], None] | None = None
        """Says to other copies of the session with a key what has changed; see `ElsewhereChange`. `None`: they find out
        by the revision."""
        self.on_first_use: Final = on_first_use
        self._instance = instance
        self.journal: Final = journal
        self.max_initialize_params: Final = max_initialize_params

    async def record_handshake(
        self, session: ResidentSession, params: InitializeParams, version: str, request: RequestWait
    ) -> bool:
        """Commit a handshake; the session's first one makes it resident.

        Args:
            session: The session.
            params: The params of `initialize`.
            version: The version that the server answers.
            request: The request.

        Returns:
            Whether the session is live.

        Raises:
            SessionStoreError: The handshake could not be stored.
        """
        log, key = self._registry.log, session_key(session.session_id)
        with telemetry.within(telemetry.begin_span("handshake", log.namespace, key=key)) as span:
            try:
                if session.record is None:
                    await self._create(session, key, params, version, request)
                    return True
                async with session.recording:
                    return await self._replace(session, session.record, params, version, request)
            except Exception as error:
                refuse(error, key, log)
                log.not_opened(reason_of(error), seconds=clock.now() - request.arrived)
                telemetry.fail_span(span, error)
                raise

    async def _create(
        self, session: ResidentSession, key: UUID, params: InitializeParams, version: str, request: RequestWait
    ) -> None:
        self._registry.promise(session)
        state = session.new_state or {}
        try:
            record = await self.store.create(
                NewSession(
                    key=key,
                    initialize_params=params.text,
                    protocol_version=version,
                    client_name=params.client_name,
                    client_version=params.client_version,
                    principal=principal_of(session.owner),
                    instance=self._instance,
                    state=tuple(state.values()) if state else (),
                ),
                request,
            )
            while (late := session.new_state or {}) != state:
                # Changed by a task of the application's while the record was being stored.
                for name, value in late.items():
                    if state.get(name) != value:
                        await self.state.put(key, value)
                for name in state.keys() - late.keys():
                    await self.state.delete(key, name)
                state = late
            session.new_state = None
            if state:
                session.watched = {name: one.value for name, one in state.items() if one.watched}
        except BaseException:
            self._registry.withdraw()
            raise
        session.stored(record, self.store.inner.retention, new=True)
        self._registry.log.opened(record, seconds=clock.now() - request.arrived)
        # Only now does another copy leave: a handshake that fails, whatever for, evicts none.
        self._registry.opened(session)

    async def _replace(
        self,
        session: ResidentSession,
        record: SessionRecord,
        params: InitializeParams,
        version: str,
        request: RequestWait,
    ) -> bool:
        live = await self.store.replace_initialize(
            record.key,
            request,
            initialize_params=params.text,
            protocol_version=version,
            client_name=params.client_name,
            client_version=params.client_version,
        )
        if live:
            assert session.record is not None
            session.record = dataclasses.replace(
                session.record,
                initialize_params=params.text,
                protocol_version=version,
                client_name=params.client_name,
                client_version=params.client_version,
            )
            await self._learn_revision(session, session.record)
            self._registry.log.opened_again(seconds=clock.now() - request.arrived)
            # The `notifications/initialized` that follows is not the one that was replayed.
            session.loop.swallow_initialized = False
        else:
            await self.on_not_live([record.key])
        return live

    async def _learn_revision(self, session: ResidentSession, record: SessionRecord) -> None:
        """Find out which revision a repeated `initialize` has made: another copy may have made one before it."""
        try:
            stored = await self.store.inner.load(record.key)
        except SessionStoreError as error:
            log_refusal(error, record.key, self._registry.log)
            stored = None
        revision = record.revision + 1 if stored is None else stored.revision
        if stored is not None and session.record is not None and revision == session.record.revision + 1:
            session.record = dataclasses.replace(session.record, revision=revision)
        else:
            session.stale_since = max(session.stale_since, revision)
        if self.announce is not None:
            self.announce(record.key, ElsewhereChange(revision).encode())

    async def record_call(
        self,
        session: ResidentSession,
        write: JournalWrite,
        call: OwnCall,
        method: str,
        params: Mapping[str, Any] | None,
    ) -> bool:
        """Commit what a call changes in the journal of its session, and say so to other copies.

        Args:
            session: The session.
            write: What it changes.
            call: The call, whose handler has run.
            method: Its method.
            params: Its params.

        Returns:
            Whether the session is live.

        Raises:
            SessionStoreError: The call could not be stored.
        """
        async with session.recording:
            assert session.record is not None
            try:
                revision = await self.store.inner.write_journal(
                    session.record.key, method=write.method, subject=write.subject, params=write.params
                )
            except JournalFull:
                raise
            except Exception as error:
                log_refusal(error, session.record.key, self._registry.log)
                raise
            if revision is None:
                await self.on_not_live([session.record.key])
                return False
            self._take_over(session, session.record, revision, write, call)
            if self.announce is not None:
                self.announce(session.record.key, self.journal.change(revision, write, method, params))
            return True

    async def write_watched(
        self, session: ResidentSession, name: str, state: NewState | None, *, expected: int | None = None
    ) -> None:
        """Commit a watched value of a session or its removal, take it over in this copy, and say so to others.

        Args:
            session: The session, whose handshake is committed.
            name: Name of the value.
            state: The value; `None` removes it.
            expected: See `StateStore.put`.

        Raises:
            StateConflict: The value has another version.
            NoSession: The session is not live.
            SessionStoreError: The value could not be stored.
        """
        # One after the other, so that the last one that is committed is the one that this copy has.
        async with session.recording:
            record = session.record
            assert record is not None
            try:
                if state is None:
                    revision = await self.state.delete(record.key, name)
                else:
                    revision = await self.state.put(record.key, state, expected=expected)
            except NoSession:
                await self.on_not_live([record.key])
                raise
            watched = {other: value for other, value in (session.watched or {}).items() if other != name}
            session.watched = watched if state is None else {**watched, name: state.value}
            session.watched_revision = max(session.watched_revision, revision)
            if session.record is not None and revision == session.record.revision + 1:
                session.record = dataclasses.replace(session.record, revision=session.set_state.reached(revision))
            elif session.record is not None and revision > session.record.revision:
                # Another copy has changed something that this one does not have.
                session.stale_since = max(session.stale_since, revision)
                self._registry.renew_if_stale(session)
            if self.announce is not None:
                self.announce(record.key, ElsewhereChange(revision).encode())

    def _take_over(
        self, session: ResidentSession, record: SessionRecord, revision: int, write: JournalWrite, call: OwnCall
    ) -> None:
        """Note which revision a call to this copy has made."""
        state = session.set_state
        if not state.is_last(call):
            # The journal says which of the two calls is the last one. So the copy counts as one that has not run it.
            session.stale_since = max(session.stale_since, revision)
            self._registry.renew_if_stale(session)
            return
        state.keep(write.name, is_set=write.params is not None)
        if revision == record.revision + 1:
            session.record = dataclasses.replace(record, revision=state.reached(revision))
        elif revision > record.revision:
            # Another copy has changed something that this one does not have.
            state.ahead[revision] = write.name
            session.stale_since = max(session.stale_since, revision)
