/* What the client is told. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/socket.h>

#include "nsn_relay_internal.h"

void nsn_relay_put(struct nsn_relay *r, const void *bytes, size_t length)
{
    if (!nsn_bytes_add(&r->out, bytes, length))
        r->over = r->broken = true;
}

void nsn_relay_say(struct nsn_relay *r, const char *format, ...)
{
    char line[3 * LINE_MAX_BYTES];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    nsn_relay_put(r, line, (size_t)length < sizeof line ? (size_t)length : sizeof line - 1);
}

void nsn_relay_fail(struct nsn_relay *r, const char *words)
{
    nsn_relay_say(r, "-ERR '%s'\r\n", words);
    r->over = true;
}

void nsn_relay_send(struct nsn_relay *r)
{
    while (!r->broken && nsn_bytes_length(&r->out)) {
        ssize_t sent = send(r->client, nsn_bytes_front(&r->out), nsn_bytes_length(&r->out), MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (sent < 0) {
            r->broken = r->ended = true;
            return;
        }
        nsn_bytes_take(&r->out, (size_t)sent);
        r->unread_since = 0;
    }
}

void nsn_relay_ok(struct nsn_relay *r)
{
    if (r->verbose)
        nsn_relay_put(r, "+OK\r\n", 5);
}

/* The number, and one character behind it. */
static void put_number(struct nsn_relay *r, size_t number, char behind)
{
    char digits[24], *at = digits + sizeof digits;
    *--at = behind;
    do
        *--at = (char)('0' + number % 10);
    while (number /= 10);
    nsn_relay_put(r, at, (size_t)(digits + sizeof digits - at));
}

void nsn_relay_put_message(struct nsn_relay *r, uint32_t sid, struct nsn_word subject, struct nsn_word reply,
                           const uint8_t *headers, size_t header_length, const uint8_t *payload, size_t payload_length)
{
    bool with_headers = header_length && r->headers;
    nsn_relay_put(r, with_headers ? "HMSG " : "MSG ", with_headers ? 5 : 4);
    nsn_relay_put(r, subject.at, subject.length);
    nsn_relay_put(r, " ", 1);
    put_number(r, sid, ' ');
    if (reply.length) {
        nsn_relay_put(r, reply.at, reply.length);
        nsn_relay_put(r, " ", 1);
    }
    if (with_headers)
        put_number(r, header_length, ' ');
    else
        header_length = 0;
    put_number(r, header_length + payload_length, '\r');
    nsn_relay_put(r, "\n", 1);
    nsn_relay_put(r, headers, header_length);
    nsn_relay_put(r, payload, payload_length);
    nsn_relay_put(r, "\r\n", 2);
}
