"""Checks of a manager's arguments: what cannot work is refused by its name, before anything is made of it."""

from __future__ import annotations

from collections.abc import Iterable

from mcp.server.transport_security import TransportSecuritySettings

from mcp_session_store.errors import ConfigurationError
from mcp_session_store.event_log import EventLog
from mcp_session_store.mailbox import Mailbox
from mcp_session_store.settings import checked_flags, checked_type
from mcp_session_store.state_store import StateStore
from mcp_session_store.store import SessionStore, Store

__all__ = ["check_options", "check_stores"]


def check_stores(store: object, event_log: object, event_store: object, mailbox: object, state_store: object) -> None:
    """Check where sessions, events, messages and state go.

    Raises:
        ConfigurationError: One of them cannot work, or they do not go together.
    """
    if not isinstance(store, SessionStore):
        raise ConfigurationError(
            f"store must be a SessionStore, not a {type(store).__name__}; a URL goes to SqlSessionStore"
        )
    if event_store is not None and not hasattr(event_store, "store_event"):
        raise ConfigurationError(f"event_store must be an EventStore of the SDK, not a {type(event_store).__name__}")
    if mailbox is not None:
        if not isinstance(mailbox, Mailbox):
            raise ConfigurationError(f"mailbox must be a Mailbox or None, not a {type(mailbox).__name__}")
        _check_namespace("mailbox", mailbox, store, "messages")
    if state_store is not None:
        if not isinstance(state_store, StateStore):
            raise ConfigurationError(f"state_store must be a StateStore or None, not a {type(state_store).__name__}")
        _check_namespace("store of state", state_store, store, "values")
    if event_log is None:
        return
    if not isinstance(event_log, EventLog):
        raise ConfigurationError(
            f"event_log must be an EventLog, not a {type(event_log).__name__}; an EventStore of the SDK goes to "
            "event_store"
        )
    if event_store is not None:
        raise ConfigurationError("event_log and event_store are both where events go; give one of them")
    _check_namespace("event log", event_log, store, "events")
    if mailbox is None:
        raise ConfigurationError(
            "event_log needs a mailbox, which shows that an instance has died and its calls are lost: give as mailbox "
            "(durable_app: relay) the SqlMailbox, MemoryMailbox or Mailbox of your own that belongs to the same store"
        )


def _check_namespace(name: str, checked: Store, store: SessionStore, content: str) -> None:
    if checked.namespace != store.namespace:
        raise ConfigurationError(
            f"the {name}'s namespace {checked.namespace!r} is not the store's, {store.namespace!r}: {content} "
            "belong to the sessions of one"
        )


def check_options(
    *,
    relay: object,
    json_response: object,
    security_settings: object,
    retry_interval: object,
    max_request_body_size: object,
    on_restore: object,
    on_end: object,
    journaled_methods: object,
    close_store: object,
    close_event_log: object,
    close_mailbox: object,
    close_state_store: object,
) -> None:
    """Check the options that are not numbers of `InstanceSettings`.

    Raises:
        ConfigurationError: One of them has another type than it may have.
    """
    checked_flags(
        relay=relay,
        json_response=json_response,
        close_store=close_store,
        close_event_log=close_event_log,
        close_mailbox=close_mailbox,
        close_state_store=close_state_store,
    )
    checked_type(
        "security_settings", security_settings, TransportSecuritySettings | None, "a TransportSecuritySettings or None"
    )
    for name, hook in (("on_restore", on_restore), ("on_end", on_end)):
        if hook is not None and not callable(hook):
            raise ConfigurationError(f"{name} must be a function or None, not a {type(hook).__name__}")
    checked_type("journaled_methods", journaled_methods, Iterable, "a sequence of JournaledMethod objects")
    if retry_interval is not None:
        _check_count("retry_interval", retry_interval, least=0)
    _check_count("max_request_body_size", max_request_body_size, least=1)


def _check_count(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name}={value!r} is not a whole number of {least} or more; give one")
