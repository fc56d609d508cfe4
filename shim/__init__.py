"""NATS on INSANE: nats-py's Client whose messages travel through this host's shared memory.

client.py is the API, pump.py the delivery, session.py the glue to libnsn, node.py the search for a node, qos.py its policies,
nats_py.py what is relied on in nats-py.
"""
