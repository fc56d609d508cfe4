/* The lines of NATS's client protocol, as the client sends them. */
#include <errno.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>

#include "nsn_relay_internal.h"

#define IN_STEP 65536u

static bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r'; }

static int split(char *line, size_t length, struct nsn_word *words, int most)
{
    int count = 0;
    for (size_t i = 0; i < length;) {
        while (i < length && is_space(line[i]))
            i++;
        size_t start = i;
        while (i < length && !is_space(line[i]))
            i++;
        if (i > start) {
            if (count == most)
                return most + 1;
            words[count++] = (struct nsn_word){line + start, i - start};
        }
    }
    return count;
}

/* -1: not a number of at most nine digits. */
static int64_t number(struct nsn_word word)
{
    int64_t value = 0;
    if (!word.length || word.length > 9)
        return -1;
    for (size_t i = 0; i < word.length; i++) {
        if (word.at[i] < '0' || word.at[i] > '9')
            return -1;
        value = 10 * value + (word.at[i] - '0');
    }
    return value;
}

/* PUB subject [reply] size, HPUB subject [reply] headers size; then as many bytes and a line's end. */
static enum nsn_relay_step take_publish(struct nsn_relay *r, char *arguments, size_t length, size_t line, bool with_headers)
{
    struct nsn_word words[4], reply = {"", 0};
    int count = split(arguments, length, words, 4), least = with_headers ? 3 : 2;
    if (count != least && count != least + 1) {
        r->over = true;
        return DONE;
    }
    if (count == least + 1)
        reply = words[1];
    int64_t total = number(words[count - 1]), header_length = with_headers ? number(words[count - 2]) : 0;
    if (total < 0 || header_length < 0 || header_length > total || (with_headers && !r->headers)) {
        r->over = true;
        return DONE;
    }
    if ((uint64_t)total > r->options->max_payload) {
        nsn_relay_fail(r, "Maximum Payload Violation");
        return DONE;
    }
    size_t whole = line + (size_t)total + 2;
    if (nsn_bytes_length(&r->in) < whole)
        return MORE;
    const uint8_t *payload = nsn_bytes_front(&r->in) + line;
    if (memcmp(payload + total, "\r\n", 2) != 0) {
        nsn_relay_fail(r, "Unknown Protocol Operation");
        return DONE;
    }
    enum nsn_relay_step step = nsn_relay_publish(r, words[0], reply, payload, (size_t)header_length, payload + header_length,
                                                 (size_t)(total - header_length));
    if (step == DONE) {
        r->checked = false;
        nsn_bytes_take(&r->in, whole);
    }
    return step;
}

/* What CONNECT says of itself: `"key":true` or `"key":false`, which cannot stand in a string, whose quotes are escaped. */
static bool flag(const char *json, size_t length, const char *key, bool otherwise)
{
    const char *at = memmem(json, length, key, strlen(key));
    if (!at)
        return otherwise;
    at += strlen(key);
    const char *end = json + length;
    while (at < end && (*at == ' ' || *at == ':'))
        at++;
    return at < end && *at == 't';
}

static void take_connect(struct nsn_relay *r, const char *json, size_t length)
{
    r->verbose = flag(json, length, "\"verbose\"", true);
    r->pedantic = flag(json, length, "\"pedantic\"", true);
    r->no_echo = !flag(json, length, "\"echo\"", true);
    r->headers = flag(json, length, "\"headers\"", false);
    r->no_responders = flag(json, length, "\"no_responders\"", false);
    if (r->no_responders && !r->headers)
        nsn_relay_fail(r, "no responders requires headers support");
    else
        nsn_relay_ok(r);
}

static bool is(struct nsn_word verb, const char *name)
{
    return verb.length == strlen(name) && strncasecmp(verb.at, name, verb.length) == 0;
}

static void take_subscribe(struct nsn_relay *r, char *arguments, size_t length)
{
    struct nsn_word words[3], none = {"", 0};
    int count = split(arguments, length, words, 3);
    int64_t sid = count == 2 || count == 3 ? number(words[count - 1]) : -1;
    if (sid < 0)
        r->over = true;
    else
        nsn_relay_subscribe(r, (uint32_t)sid, words[0], count == 3 ? words[1] : none);
}

static void take_unsubscribe(struct nsn_relay *r, char *arguments, size_t length)
{
    struct nsn_word words[2];
    int count = split(arguments, length, words, 2);
    int64_t sid = count == 1 || count == 2 ? number(words[0]) : -1;
    if (sid < 0)
        r->over = true;
    else
        nsn_relay_unsubscribe(r, (uint32_t)sid, count == 2 ? number(words[1]) : 0);
}

/* The next line that the client has sent. */
enum nsn_relay_step nsn_relay_take_line(struct nsn_relay *r)
{
    char *line = (char *)nsn_bytes_front(&r->in);
    size_t there = nsn_bytes_length(&r->in);
    const char *end = there ? memchr(line, '\n', there) : NULL;
    if (!end) {
        if (there > LINE_MAX_BYTES + 8)
            nsn_relay_fail(r, "maximum control line exceeded");
        return MORE;
    }
    size_t whole = (size_t)(end - line) + 1, length = whole - 1;
    if (length && line[length - 1] == '\r')
        length--;
    size_t verb = strcspn(line, " \t\r\n"), skip = verb < length ? verb + 1 : length;
    if (length - skip > LINE_MAX_BYTES) {
        nsn_relay_fail(r, "maximum control line exceeded");
        return DONE;
    }
    struct nsn_word name = {line, verb};
    char *arguments = line + skip;
    if (!r->session) {
        if (is(name, "CONNECT"))
            take_connect(r, arguments, length - skip);
        else
            nsn_relay_fail(r, "Authorization Violation");
    } else if (is(name, "PUB") || is(name, "HPUB")) {
        return take_publish(r, arguments, length - skip, whole, is(name, "HPUB"));
    } else if (nsn_relay_holds(r) && (is(name, "SUB") || is(name, "UNSUB"))) {
        return WAIT; /* what was received before is dealt with first */
    } else if (is(name, "SUB")) {
        take_subscribe(r, arguments, length - skip);
    } else if (is(name, "UNSUB")) {
        take_unsubscribe(r, arguments, length - skip);
    } else if (is(name, "PING")) {
        if (!r->pong)
            r->pong = nsn_barrier_begin(r->session);
        if (nsn_relay_holds(r) || (r->pong > 0 && nsn_barrier_done(r->session, r->pong) == 0))
            return WAIT;
        r->pong = 0;
        nsn_relay_put(r, "PONG\r\n", 6);
    } else if (is(name, "CONNECT")) {
        take_connect(r, arguments, length - skip);
    } else if (!is(name, "PONG")) {
        nsn_relay_fail(r, "Unknown Protocol Operation");
    }
    nsn_bytes_take(&r->in, whole);
    return DONE;
}

void nsn_relay_read(struct nsn_relay *r)
{
    size_t most = 2 * LINE_MAX_BYTES + r->options->max_payload + IN_STEP;
    while (!r->ended && nsn_bytes_length(&r->in) < most) {
        uint8_t *room = nsn_bytes_room(&r->in, IN_STEP);
        if (!room) {
            r->over = true;
            return;
        }
        ssize_t length = recv(r->client, room, IN_STEP, MSG_DONTWAIT);
        if (length < 0 && errno == EINTR)
            continue;
        if (length < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            return;
        if (length <= 0) {
            r->ended = true;
            return;
        }
        nsn_bytes_added(&r->in, (size_t)length);
        if ((size_t)length < IN_STEP)
            return;
    }
}
