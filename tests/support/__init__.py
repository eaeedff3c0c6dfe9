"""Databases, faulty networks and stores, servers and clients for the tests."""
