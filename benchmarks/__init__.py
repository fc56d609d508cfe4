"""Speed on one host, always beside nats-py and nats-server in the same run: `python -m benchmarks`."""
