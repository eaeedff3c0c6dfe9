"""What the tests stand on: databases, faulty networks, real server processes, raw HTTP clients."""
