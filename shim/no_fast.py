"""Stands for insane_nats._fast where there is no compiled part: the bases of classes that have no objects there."""

from __future__ import annotations


class Connection: ...


class Loan: ...


class Block: ...


class Message: ...


class Queue: ...


class Subscription: ...


class Iterator: ...
