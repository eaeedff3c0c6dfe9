"""Sessions in SQL: records, journal, limits, ends, and their sweep."""
