"""Tests against programs that stand between this package and a database. `.ci/interop` runs them."""
