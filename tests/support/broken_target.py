"""A module that cannot be imported: its own import fails."""

import no_such_module_of_this_targets  # type: ignore[import-not-found]  # noqa: F401
