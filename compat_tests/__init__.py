"""The conformance suite: the same tests against a NATS server and against insane_nats."""
