/* connection.publish(subject, payload, reply, headers): the way of a message without headers on a connection that is well.
 * Everything else is Client._publish_slowly's, and what libnsn did not take at once is Client._publish_rest's. */
#include "fast.h"

#include <string.h>

enum {
    SMALL = 256,      /* bytes: messages up to here reach FAST_YIELD_S first */
    CLOCK_EVERY = 8,  /* small messages between looks at the clock */
    NOT_PLAIN = 1,    /* beside negative errnos */
};

enum { SUBJECT, PAYLOAD, REPLY, HEADERS };

static PyObject *or_none(PyObject *object)
{
    return object ? object : Py_None;
}

/* What a server keeps for itself, as a subject or as a reply (shim/subjects.py tells them apart). */
static bool is_reserved(const char *subject)
{
    static const char *const prefixes[] = {"_R_.", "_GR_.", "$GR.", "$NRG.", "$JS.ACK."};
    if ((subject[0] != '_' && subject[0] != '$') || subject[1] == 'I') /* an inbox is the usual one */
        return false;
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++)
        if (strncmp(subject, prefixes[i], strlen(prefixes[i])) == 0)
            return true;
    return false;
}

/* The bytes of a subject that nats-py would let pass; NULL without an exception when it is not so plain. */
static const char *subject_bytes(PyObject *subject, Py_ssize_t *length)
{
    if (!PyUnicode_CheckExact(subject))
        return NULL;
    const char *bytes = PyUnicode_AsUTF8AndSize(subject, length);
    if (!bytes) {
        PyErr_Clear();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < *length; i++)
        if (bytes[i] == ' ' || bytes[i] == '\t' || bytes[i] == '\r' || bytes[i] == '\n')
            return NULL;
    return *length && !is_reserved(bytes) ? bytes : NULL;
}

static bool is_well(struct fast_connection *connection)
{
    return connection->session && !connection->waiting && !connection->pedantic &&
           fast_status(connection) == NATS_CONNECTED &&
           PyDict_GetItemWithError(connection->attributes, fast_name__removed) == Py_False;
}

/* After a message went out: what the connection keeps about it. -1 with an exception. */
static int note(struct fast_connection *connection, int reached, long long size, PyObject *subject, PyObject *reply)
{
    PyObject *stats = fast_stats(connection);
    bool counted = stats && !fast_count(stats, fast_name_out_msgs, 1) && !fast_count(stats, fast_name_out_bytes, size);
    Py_XDECREF(stats);
    if (!counted)
        return -1;
    if (reached == 0 && reply && fast_call_method(connection->client, fast_name__no_responders, subject, reply))
        return -1;
    return connection->trimming ? 0 : fast_call_method(connection->client, fast_name__start_trim, NULL, NULL);
}

/* Publishes when that is plain. 0: it went out, and was noted; NOT_PLAIN: nothing was done; negative: libnsn's errno, nothing
 * was done; an exception may be set with any of the last two. reply: NULL, None or "" for none. */
static int post(struct fast_connection *connection, PyObject *subject, PyObject *payload, PyObject *reply)
{
    if (!is_well(connection) || !PyBytes_CheckExact(payload))
        return NOT_PLAIN;
    Py_ssize_t subject_length, reply_length = 0, size = PyBytes_Size(payload);
    const char *subject_at = subject_bytes(subject, &subject_length), *reply_at = "";
    if (!reply || reply == Py_None || (PyUnicode_CheckExact(reply) && PyUnicode_GetLength(reply) == 0))
        reply = NULL;
    else
        reply_at = subject_bytes(reply, &reply_length);
    if (!subject_at || !reply_at || size > connection->max_payload)
        return NOT_PLAIN;
    struct nsn_session *session = connection->session;
    const uint8_t *data = (const uint8_t *)PyBytes_AsString(payload);
    int reached;
    if (size < FAST_ALONE) {
        reached = nsn_publish(session, subject_at, (size_t)subject_length, reply_at, (size_t)reply_length, NULL, 0, data,
                              (size_t)size);
    } else {
        fast_enter(connection->lender);
        Py_BEGIN_ALLOW_THREADS
        reached = nsn_publish(session, subject_at, (size_t)subject_length, reply_at, (size_t)reply_length, NULL, 0, data,
                              (size_t)size);
        Py_END_ALLOW_THREADS
        fast_leave(connection->lender);
    }
    if (reached < 0)
        return reached;
    if (note(connection, reached, size, subject, reply))
        return NOT_PLAIN;
    return 0;
}

static bool pass_is_due(struct fast_connection *connection, long long size)
{
    if (size > SMALL)
        connection->burst += size;
    if (connection->burst > FAST_YIELD_BYTES)
        return true;
    if (size <= SMALL && connection->publishes++ % CLOCK_EVERY)
        return false;
    return fast_now() > connection->yield_at;
}

static enum fast_step run(struct fast_call *call, PyObject **result)
{
    struct fast_connection *connection = (struct fast_connection *)call->owner;
    PyObject **argument = call->argument;
    if (call->passed) {
        connection->burst = 0;
        connection->yield_at = fast_now() + FAST_YIELD_S;
    } else {
        if (!connection->client) {
            PyErr_SetString(PyExc_RuntimeError, "publish() of a connection that was closed long ago");
            return FAST_FAILED;
        }
        int said = or_none(argument[HEADERS]) == Py_None
                       ? post(connection, argument[SUBJECT], argument[PAYLOAD], argument[REPLY])
                       : NOT_PLAIN;
        if (PyErr_Occurred())
            return FAST_FAILED;
        if (said == NOT_PLAIN)
            return fast_delegate(call, connection->client, fast_name__publish_slowly, argument[SUBJECT], argument[PAYLOAD],
                                 or_none(argument[REPLY]), or_none(argument[HEADERS]));
        if (said < 0) {
            PyObject *number = PyLong_FromLong(said);
            enum fast_step step = number ? fast_delegate(call, connection->client, fast_name__publish_rest, number,
                                                         argument[SUBJECT], argument[PAYLOAD], or_none(argument[REPLY]))
                                         : FAST_FAILED;
            Py_XDECREF(number);
            return step;
        }
        if (pass_is_due(connection, PyBytes_Size(argument[PAYLOAD])))
            return FAST_PASS;
    }
    Py_INCREF(Py_None);
    *result = Py_None;
    return FAST_DONE;
}

static int place_of(PyObject *name)
{
    PyObject *const known[FAST_ARGUMENTS] = {fast_name_subject, fast_name_payload, fast_name_reply, fast_name_headers};
    for (int i = 0; i < FAST_ARGUMENTS; i++)
        if (PyUnicode_Compare(name, known[i]) == 0)
            return i;
    return -1;
}

PyObject *fast_publish(PyObject *self, PyObject *const *given, Py_ssize_t count, PyObject *names)
{
    PyObject *arguments[FAST_ARGUMENTS] = {NULL, NULL, NULL, NULL};
    if (count > FAST_ARGUMENTS) {
        PyErr_Format(PyExc_TypeError, "publish() takes from 1 to %d arguments but %zd were given", FAST_ARGUMENTS, count);
        return NULL;
    }
    for (Py_ssize_t i = 0; i < count; i++)
        arguments[i] = given[i];
    for (Py_ssize_t i = 0; names && i < PyTuple_Size(names); i++) {
        PyObject *name = PyTuple_GetItem(names, i);
        int place = place_of(name);
        if (place < 0 || arguments[place]) {
            PyErr_Format(PyExc_TypeError, "publish() got %s argument '%U'", place < 0 ? "an unexpected" : "multiple values for",
                         name);
            return NULL;
        }
        arguments[place] = given[count + i];
    }
    if (!arguments[SUBJECT]) {
        PyErr_SetString(PyExc_TypeError, "publish() missing 1 required positional argument: 'subject'");
        return NULL;
    }
    PyObject *nothing = arguments[PAYLOAD] ? NULL : PyBytes_FromStringAndSize(NULL, 0);
    if (!arguments[PAYLOAD] && !(arguments[PAYLOAD] = nothing))
        return NULL;
    PyObject *call = fast_call_new(run, "Client.publish", self, arguments);
    Py_XDECREF(nothing);
    return call;
}

PyObject *fast_post(PyObject *self, PyObject *const *given, Py_ssize_t count)
{
    struct fast_connection *connection = (struct fast_connection *)self;
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "post() takes subject, payload and reply");
        return NULL;
    }
    if (!connection->client)
        Py_RETURN_FALSE;
    int said = post(connection, given[0], given[1], given[2]);
    if (PyErr_Occurred())
        return NULL;
    return PyBool_FromLong(said == 0);
}
