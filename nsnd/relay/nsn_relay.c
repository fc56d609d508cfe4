#include "nsn_relay.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "nsn_permissions.h"
#include "nsn_relay_bytes.h"
#include "nsn_session.h"
#include "nsn_subject.h"

#define LINE_MAX_BYTES 4096u      /* arguments of a line */
#define OUT_MAX (4u << 20)        /* bytes that wait for the client; above, nothing more is taken from the fabric for it */
#define SAID_MAX (2 * OUT_MAX)    /* above, nothing more is taken from the client either: what it says is answered */
#define IN_STEP 65536u
#define BATCH 256
#define BLOB_SIZE (256u << 10)
#define BUDGET (64ull << 20)      /* of a relay's session, and as much as the largest message has */
#define CONNECT_NS 2000000000ull  /* for the client's CONNECT, as a NATS server waits */
#define ATTACH_NS 5000000000ull
#define WRITE_DEADLINE_NS 10000000000ull
#define LAST_NS 2000000000ull     /* at the end, for subscribers to take what was published */
#define AGAIN_MS 1
#define IDLE_MS 1000

struct subscription {
    struct subscription *next;
    uint32_t sid;
    uint64_t delivered;
    int ending; /* unsubscribed, and gone with this barrier; 0: it is not */
    size_t pattern_length, queue_length;
    char text[]; /* pattern, queue */
};

struct relay {
    const struct nsn_relay_options *options;
    const struct nsn_permissions *may;
    struct nsn_replies *replies;
    struct nsn_session *session;
    int client;
    struct nsn_bytes in, out;
    struct subscription *subscriptions, **last_subscription;
    uint32_t subscription_count;
    bool verbose, pedantic, no_echo, headers, no_responders;
    bool ended;         /* the client has said all that it will */
    bool over;          /* nothing more is read from it */
    bool broken;        /* nothing more is written to it */
    bool checked;       /* the line at the front of `in` was, and waits for the fabric */
    uint64_t waits_since; /* a publish waits for room */
    uint64_t unread_since; /* the client has taken nothing while too much waits for it */
    int pong;           /* barrier behind which PONG is due; 0: none */
    int count, next;    /* of messages; those from next on wait until the client reads */
    struct nsn_message messages[BATCH];
    uint8_t blob[BLOB_SIZE];
};

enum step { MORE, WAIT, DONE }; /* the next line is not whole; is whole and waits for the fabric; is dealt with */

struct word {
    const char *at;
    size_t length;
};

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* --- to the client -------------------------------------------------------------------------------------------------- */

static void put(struct relay *r, const void *bytes, size_t length)
{
    if (!nsn_bytes_add(&r->out, bytes, length))
        r->over = r->broken = true;
}

static void say(struct relay *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void say(struct relay *r, const char *format, ...)
{
    char line[3 * LINE_MAX_BYTES];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    put(r, line, (size_t)length < sizeof line ? (size_t)length : sizeof line - 1);
}

static void fail(struct relay *r, const char *words)
{
    say(r, "-ERR '%s'\r\n", words);
    r->over = true;
}

static void send_out(struct relay *r)
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

static struct subscription *find(struct relay *r, uint32_t sid)
{
    struct subscription *one = r->subscriptions;
    while (one && one->sid != sid)
        one = one->next;
    return one;
}

static void remove_subscription(struct relay *r, struct subscription *gone)
{
    struct subscription **at = &r->subscriptions;
    while (*at != gone)
        at = &(*at)->next;
    *at = gone->next;
    if (!*at)
        r->last_subscription = at;
    r->subscription_count--;
    nsn_unsubscribe(r->session, gone->sid, 0);
    if (gone->ending)
        nsn_barrier_cancel(r->session, gone->ending);
    free(gone);
}

static void put_message(struct relay *r, uint32_t sid, struct word subject, struct word reply, const uint8_t *headers,
                        size_t header_length, const uint8_t *payload, size_t payload_length)
{
    char line[64];
    bool with_headers = header_length && r->headers;
    put(r, with_headers ? "HMSG " : "MSG ", with_headers ? 5 : 4);
    put(r, subject.at, subject.length);
    put(r, line, (size_t)snprintf(line, sizeof line, " %u ", sid));
    if (reply.length) {
        put(r, reply.at, reply.length);
        put(r, " ", 1);
    }
    if (with_headers)
        put(r, line, (size_t)snprintf(line, sizeof line, "%zu ", header_length));
    else
        header_length = 0;
    put(r, line, (size_t)snprintf(line, sizeof line, "%zu\r\n", header_length + payload_length));
    put(r, headers, header_length);
    put(r, payload, payload_length);
    put(r, "\r\n", 2);
}

/* In a line it is one word: whoever publishes may write anything there. */
static bool is_word(struct word word)
{
    for (size_t i = 0; i < word.length; i++)
        if (word.at[i] == ' ' || word.at[i] == '\t' || word.at[i] == '\r' || word.at[i] == '\n')
            return false;
    return true;
}

static void deliver_one(struct relay *r, const struct nsn_message *message)
{
    const uint8_t *at = r->blob + message->offset;
    struct word subject = {(const char *)at, message->subject_length};
    struct word reply = {subject.at + subject.length, message->reply_length};
    const uint8_t *headers = (const uint8_t *)reply.at + reply.length;
    if (message->flags & NSN_MESSAGE_LARGE)
        headers = nsn_large(r->session, message->large);
    const uint8_t *payload = headers ? headers + message->header_length : NULL;
    struct subscription *subscription = find(r, message->sid);
    struct word queue = {"", 0};
    if (subscription)
        queue = (struct word){subscription->text + subscription->pattern_length, subscription->queue_length};
    if (headers && subscription && is_word(subject) && is_word(reply)) {
        if (nsn_may_hear(r->may, subject.at, subject.length, queue.at, queue.length)) {
            put_message(r, message->sid, subject, reply, headers, message->header_length, payload, message->payload_length);
            nsn_replies_heard(r->replies, r->may, reply.at, reply.length, now_ns());
        } else if (queue.length && !(message->flags & NSN_MESSAGE_PASSED_ON)) {
            nsn_pass_on(r->session, message->sid, subject.at, subject.length, reply.at, reply.length, headers,
                        message->header_length, payload, message->payload_length);
        }
    }
    if (message->flags & NSN_MESSAGE_LARGE)
        nsn_large_release(r->session, message->large);
    if (subscription && ++subscription->delivered && (message->flags & NSN_MESSAGE_LAST))
        remove_subscription(r, subscription);
}

static bool is_full(const struct relay *r) { return nsn_bytes_length(&r->out) > OUT_MAX; }
static bool holds(const struct relay *r) { return r->next < r->count; }

/* What the fabric has for the client, unless that does not read. True when there was something. */
static bool deliver(struct relay *r)
{
    if (is_full(r)) {
        if (!r->unread_since)
            r->unread_since = now_ns();
        r->over |= now_ns() - r->unread_since > WRITE_DEADLINE_NS; /* a slow consumer */
        return false;
    }
    if (!holds(r)) {
        r->next = 0;
        r->count = nsn_receive(r->session, r->messages, BATCH, r->blob, sizeof r->blob, 0);
        r->over |= r->count < 0;
    }
    bool some = holds(r);
    while (holds(r) && !is_full(r)) /* a batch may have one large message for many subscriptions */
        deliver_one(r, &r->messages[r->next++]);
    return some;
}

/* --- from the client ------------------------------------------------------------------------------------------------ */

static bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r'; }

static int split(char *line, size_t length, struct word *words, int most)
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
            words[count++] = (struct word){line + start, i - start};
        }
    }
    return count;
}

/* -1: not a number of at most nine digits. */
static int64_t number(struct word word)
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

static bool begins(struct word word, const char *with)
{
    return word.length > strlen(with) && memcmp(word.at, with, strlen(with)) == 0;
}

static void ok(struct relay *r)
{
    if (r->verbose)
        put(r, "+OK\r\n", 5);
}

static void subscribe(struct relay *r, uint32_t sid, struct word pattern, struct word queue)
{
    struct subscription *known = find(r, sid);
    if (known && known->ending)
        remove_subscription(r, known);
    else if (known) {
        ok(r);
        return;
    }
    char of_queue[LINE_MAX_BYTES + 32] = "";
    if (queue.length)
        snprintf(of_queue, sizeof of_queue, " using queue \"%.*s\"", (int)queue.length, queue.at);
    bool reserved = queue.length == 5 && memcmp(queue.at, "_sys_", 5) == 0;
    if (!nsn_pattern_valid(pattern.at, pattern.length)) {
        say(r, "-ERR 'Invalid Subject'\r\n");
        return;
    }
    if (reserved || !nsn_may_subscribe(r->may, pattern.at, pattern.length, queue.at, queue.length)) {
        say(r, "-ERR 'Permissions Violation for Subscription to \"%.*s\"%s'\r\n", (int)pattern.length, pattern.at, of_queue);
        return;
    }
    bool room = r->subscription_count < r->options->subscriptions_max;
    struct subscription *one = room ? malloc(sizeof *one + pattern.length + queue.length) : NULL;
    if (!one) {
        say(r, "-ERR 'maximum subscriptions exceeded'\r\n");
        return;
    }
    *one = (struct subscription){.sid = sid, .pattern_length = pattern.length, .queue_length = queue.length};
    memcpy(one->text, pattern.at, pattern.length);
    memcpy(one->text + pattern.length, queue.at, queue.length);
    if (nsn_subscribe(r->session, sid, pattern.at, pattern.length, queue.at, queue.length) < 0) {
        free(one);
        say(r, "-ERR 'maximum subscriptions exceeded'\r\n");
        return;
    }
    *r->last_subscription = one;
    r->last_subscription = &one->next;
    r->subscription_count++;
    ok(r);
}

/* What was published before still goes to it: a client that drains has all of that in front of its next PONG. */
static void unsubscribe(struct relay *r, uint32_t sid, int64_t most)
{
    struct subscription *one = find(r, sid);
    if (one && !one->ending && most > 0 && one->delivered < (uint64_t)most)
        nsn_unsubscribe(r->session, sid, (uint64_t)most);
    else if (one && !one->ending && nsn_drain(r->session, sid) == 0)
        one->ending = nsn_barrier_begin(r->session);
    ok(r);
}

/* Subscriptions whose last message has come. */
static void end_subscriptions(struct relay *r)
{
    for (struct subscription *one = r->subscriptions, *next; one; one = next) {
        next = one->next;
        if (one->ending && nsn_barrier_done(r->session, one->ending) != 0) {
            one->ending = 0;
            remove_subscription(r, one);
        }
    }
}

static void tell_nobody_answers(struct relay *r, struct word subject, struct word reply)
{
    for (struct subscription *one = r->subscriptions; one; one = one->next) {
        if (one->queue_length || one->ending || !nsn_pattern_matches(one->text, one->pattern_length, reply.at, reply.length))
            continue;
        char headers[LINE_MAX_BYTES + 64];
        int length = snprintf(headers, sizeof headers, "NATS/1.0 503\r\nNats-Subject: %.*s\r\n\r\n", (int)subject.length,
                              subject.at);
        put_message(r, one->sid, reply, (struct word){"", 0}, (uint8_t *)headers, (size_t)length, NULL, 0);
        return;
    }
}

/* Whether the client may; if not, it is told so. */
static bool may_publish(struct relay *r, struct word subject, struct word reply)
{
    if (begins(subject, "_GR_.") || begins(subject, "$GR.") || begins(subject, "$NRG.") ||
        (!nsn_may_publish(r->may, subject.at, subject.length) &&
         !nsn_replies_answer(r->replies, r->may, subject.at, subject.length, now_ns()))) {
        say(r, "-ERR 'Permissions Violation for Publish to \"%.*s\"'\r\n", (int)subject.length, subject.at);
        return false;
    }
    if (reply.length && (begins(reply, "_R_.") || begins(reply, "_GR_.") || begins(reply, "$GR.") || begins(reply, "$JS.ACK."))) {
        say(r, "-ERR 'Permissions Violation for Publish with Reply of \"%.*s\"'\r\n", (int)reply.length, reply.at);
        return false;
    }
    return true;
}

static bool is_literal(struct word subject)
{
    return nsn_subject_routable(subject.at, subject.length) && !nsn_pattern_has_wildcard(subject.at, subject.length);
}

static enum step publish(struct relay *r, struct word subject, struct word reply, const uint8_t *headers, size_t header_length,
                         const uint8_t *payload, size_t payload_length)
{
    if (!r->checked && !may_publish(r, subject, reply))
        return DONE;
    if (!r->checked && r->pedantic && !is_literal(subject))
        say(r, "-ERR 'Invalid Publish Subject'\r\n");
    r->checked = true;
    int result = nsn_publish(r->session, subject.at, subject.length, reply.at, reply.length, headers, header_length, payload,
                             payload_length);
    if (result == -EALREADY) {
        nsn_session_process(r->session, 0);
        return WAIT;
    }
    if (result == -EAGAIN) {
        if (!r->waits_since)
            r->waits_since = now_ns();
        if (now_ns() - r->waits_since < WRITE_DEADLINE_NS)
            return WAIT;
        nsn_publish_give_up(r->session);
        r->waits_since = 0;
        return WAIT;
    }
    r->waits_since = 0;
    ok(r);
    if (result == 0 && reply.length && r->headers && r->no_responders)
        tell_nobody_answers(r, subject, reply);
    return DONE;
}

/* PUB subject [reply] size, HPUB subject [reply] headers size; then as many bytes and a line's end. */
static enum step take_publish(struct relay *r, char *arguments, size_t length, size_t line, bool with_headers)
{
    struct word words[4], reply = {"", 0};
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
        fail(r, "Maximum Payload Violation");
        return DONE;
    }
    size_t whole = line + (size_t)total + 2;
    if (nsn_bytes_length(&r->in) < whole)
        return MORE;
    const uint8_t *payload = nsn_bytes_front(&r->in) + line;
    if (memcmp(payload + total, "\r\n", 2) != 0) {
        fail(r, "Unknown Protocol Operation");
        return DONE;
    }
    enum step step = publish(r, words[0], reply, payload, (size_t)header_length, payload + header_length,
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

static void take_connect(struct relay *r, const char *json, size_t length)
{
    r->verbose = flag(json, length, "\"verbose\"", true);
    r->pedantic = flag(json, length, "\"pedantic\"", true);
    r->no_echo = !flag(json, length, "\"echo\"", true);
    r->headers = flag(json, length, "\"headers\"", false);
    r->no_responders = flag(json, length, "\"no_responders\"", false);
    if (r->no_responders && !r->headers)
        fail(r, "no responders requires headers support");
    else
        ok(r);
}

static bool is(struct word verb, const char *name)
{
    return verb.length == strlen(name) && strncasecmp(verb.at, name, verb.length) == 0;
}

static void take_subscribe(struct relay *r, char *arguments, size_t length)
{
    struct word words[3], none = {"", 0};
    int count = split(arguments, length, words, 3);
    int64_t sid = count == 2 || count == 3 ? number(words[count - 1]) : -1;
    if (sid < 0)
        r->over = true;
    else
        subscribe(r, (uint32_t)sid, words[0], count == 3 ? words[1] : none);
}

static void take_unsubscribe(struct relay *r, char *arguments, size_t length)
{
    struct word words[2];
    int count = split(arguments, length, words, 2);
    int64_t sid = count == 1 || count == 2 ? number(words[0]) : -1;
    if (sid < 0)
        r->over = true;
    else
        unsubscribe(r, (uint32_t)sid, count == 2 ? number(words[1]) : 0);
}

/* The next line that the client has sent. */
static enum step take_line(struct relay *r)
{
    char *line = (char *)nsn_bytes_front(&r->in);
    size_t there = nsn_bytes_length(&r->in);
    const char *end = there ? memchr(line, '\n', there) : NULL;
    if (!end) {
        if (there > LINE_MAX_BYTES + 8)
            fail(r, "maximum control line exceeded");
        return MORE;
    }
    size_t whole = (size_t)(end - line) + 1, length = whole - 1;
    if (length && line[length - 1] == '\r')
        length--;
    size_t verb = strcspn(line, " \t\r\n"), skip = verb < length ? verb + 1 : length;
    if (length - skip > LINE_MAX_BYTES) {
        fail(r, "maximum control line exceeded");
        return DONE;
    }
    struct word name = {line, verb};
    char *arguments = line + skip;
    if (!r->session) {
        if (is(name, "CONNECT"))
            take_connect(r, arguments, length - skip);
        else
            fail(r, "Authorization Violation");
    } else if (is(name, "PUB") || is(name, "HPUB")) {
        return take_publish(r, arguments, length - skip, whole, is(name, "HPUB"));
    } else if (holds(r) && (is(name, "SUB") || is(name, "UNSUB"))) {
        return WAIT; /* what was received before is dealt with first */
    } else if (is(name, "SUB")) {
        take_subscribe(r, arguments, length - skip);
    } else if (is(name, "UNSUB")) {
        take_unsubscribe(r, arguments, length - skip);
    } else if (is(name, "PING")) {
        if (!r->pong)
            r->pong = nsn_barrier_begin(r->session);
        if (holds(r) || (r->pong > 0 && nsn_barrier_done(r->session, r->pong) == 0))
            return WAIT;
        r->pong = 0;
        put(r, "PONG\r\n", 6);
    } else if (is(name, "CONNECT")) {
        take_connect(r, arguments, length - skip);
    } else if (!is(name, "PONG")) {
        fail(r, "Unknown Protocol Operation");
    }
    nsn_bytes_take(&r->in, whole);
    return DONE;
}

static void read_in(struct relay *r)
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

/* --- life ----------------------------------------------------------------------------------------------------------- */

/* INFO is sent, CONNECT comes. */
static bool greeted(struct relay *r)
{
    uint64_t until = now_ns() + CONNECT_NS;
    say(r, "INFO ");
    put(r, r->options->info, strlen(r->options->info));
    put(r, " \r\n", 3);
    send_out(r);
    for (;;) {
        uint64_t now = now_ns();
        if (now > until) {
            fail(r, "Authentication Timeout");
            return false;
        }
        struct pollfd one = {.fd = r->client, .events = POLLIN};
        poll(&one, 1, (int)((until - now) / 1000000u) + 1);
        read_in(r);
        enum step step = take_line(r);
        if (step == DONE || r->over)
            return !r->over;
        if (r->ended)
            return false;
    }
}

static bool attached(struct relay *r)
{
    char words[256];
    struct nsn_session_options options = {
        .socket_path = r->options->socket_path,
        .name = r->options->name,
        .application_id = r->options->application_id,
        .no_echo = r->no_echo,
        .budget = BUDGET + r->options->max_payload,
        .write_deadline_ns = WRITE_DEADLINE_NS,
    };
    r->session = nsn_session_open(&options, words, sizeof words);
    if (!r->session)
        return false;
    uint64_t until = now_ns() + ATTACH_NS;
    while (nsn_session_state(r->session) == NSN_CONNECTING && now_ns() < until) {
        struct pollfd one = {.fd = nsn_session_control_fd(r->session), .events = POLLIN};
        poll(&one, 1, 100);
        nsn_session_process(r->session, 0);
    }
    return nsn_session_state(r->session) == NSN_READY;
}

/* nsnd, and what happened to the session. */
static void attend(struct relay *r)
{
    struct nsn_event event;
    nsn_session_process(r->session, 0);
    while (nsn_next_event(r->session, &event)) {
        if (event.kind == NSN_EVENT_SLOW_CONSUMER)
            r->over = true; /* as a NATS server ends it */
        else if (event.kind == NSN_EVENT_INTEREST)
            say(r, "-ERR 'maximum subscriptions exceeded'\r\n");
        else if (event.kind == NSN_EVENT_LAME_DUCK)
            say(r, "INFO %s \r\n", r->options->lame_duck);
    }
    if (nsn_session_state(r->session) == NSN_READY)
        return;
    if (nsn_session_refusal(r->session) == EKEYREJECTED)
        say(r, "-ERR 'Authorization Violation'\r\n");
    r->over = true;
}

static void sleep_until_due(struct relay *r, bool waits, bool *trimmed)
{
    bool full = is_full(r);
    if (!full && (holds(r) || !nsn_arm(r->session)))
        return;
    short events = (short)((waits || r->ended ? 0 : POLLIN) | (nsn_bytes_length(&r->out) ? POLLOUT : 0));
    struct pollfd fds[3] = {
        {.fd = events ? r->client : -1, .events = events}, /* that it has hung up would be said again and again */
        {.fd = nsn_session_control_fd(r->session), .events = POLLIN},
        {.fd = full ? -1 : nsn_session_bell_fd(r->session), .events = POLLIN},
    };
    bool soon = waits || r->pong || nsn_receive_held(r->session);
    for (struct subscription *one = r->subscriptions; one && !soon; one = one->next)
        soon = one->ending;
    int ready = poll(fds, 3, soon ? AGAIN_MS : *trimmed && !full ? -1 : IDLE_MS);
    if (!full)
        nsn_disarm(r->session);
    if (ready == 0 && !soon)
        *trimmed = nsn_trim(r->session) == 0;
    else if (ready > 0)
        *trimmed = false;
}

void nsn_relay_permit(struct nsn_relay_options *options, const struct nsn_permissions *permissions)
{
    __atomic_store_n(&options->permissions, permissions, __ATOMIC_RELEASE); /* pairs with the load in renew_permissions() */
}

/* What may not be heard any more ends, and the client is told so. */
static void renew_permissions(struct relay *r)
{
    const struct nsn_permissions *now = __atomic_load_n(&r->options->permissions, __ATOMIC_ACQUIRE); /* pairs: permit */
    if (now == r->may)
        return;
    r->may = now;
    r->checked = false;
    for (struct subscription *one = r->subscriptions, *next; one; one = next) {
        next = one->next;
        const char *queue = one->text + one->pattern_length;
        if (one->ending || nsn_may_subscribe(r->may, one->text, one->pattern_length, queue, one->queue_length))
            continue;
        say(r, "-ERR 'Permissions Violation for Subscription to \"%.*s\"", (int)one->pattern_length, one->text);
        if (one->queue_length)
            say(r, " using queue \"%.*s\"", (int)one->queue_length, queue);
        say(r, " (sid \"%u\")'\r\n", one->sid);
        remove_subscription(r, one);
    }
}

static enum step take_next(struct relay *r)
{
    if (nsn_bytes_length(&r->out) <= SAID_MAX)
        return take_line(r);
    r->waits_since = 0; /* a publish at the front waits for its own client now, and nobody is to be given up for that */
    return WAIT;
}

static void serve(struct relay *r)
{
    bool trimmed = false;
    while (!r->over && !r->broken) {
        renew_permissions(r);
        bool busy = deliver(r);
        read_in(r);
        enum step step = DONE;
        for (int i = 0; i < BATCH && step == DONE && !r->over; i++)
            step = take_next(r);
        attend(r);
        if (!holds(r))
            end_subscriptions(r);
        send_out(r);
        if (step == MORE && r->ended)
            break;
        if (!busy && step != DONE && !r->over)
            sleep_until_due(r, step == WAIT, &trimmed);
    }
}

/* Its subscribers are to have what the client published. */
static void hand_over(struct nsn_session *session)
{
    uint64_t until = now_ns() + LAST_NS;
    while (nsn_session_state(session) == NSN_READY && now_ns() < until &&
           (nsn_session_unsent(session) || !nsn_links_taken(session))) {
        struct pollfd one = {.fd = nsn_session_control_fd(session), .events = POLLIN};
        poll(&one, 1, AGAIN_MS);
        nsn_session_process(session, 0);
    }
}

static void end(struct relay *r)
{
    send_out(r);
    shutdown(r->client, SHUT_WR);
    if (r->session) {
        hand_over(r->session);
        nsn_session_close(r->session);
    }
    for (struct subscription *one; (one = r->subscriptions);) {
        r->subscriptions = one->next;
        free(one);
    }
    nsn_bytes_free(&r->in);
    nsn_bytes_free(&r->out);
    nsn_replies_free(r->replies);
    close(r->client);
    free(r);
}

void nsn_relay_run(int client, const struct nsn_relay_options *options)
{
    struct relay *r = calloc(1, sizeof *r);
    struct nsn_replies *replies = nsn_replies_new();
    if (!r || !replies) {
        free(r);
        free(replies);
        close(client);
        return;
    }
    r->options = options;
    r->may = __atomic_load_n(&options->permissions, __ATOMIC_ACQUIRE);
    r->replies = replies;
    r->client = client;
    r->last_subscription = &r->subscriptions;
    if (greeted(r) && attached(r))
        serve(r);
    end(r);
}
