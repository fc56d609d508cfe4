/* What the client publishes: whether it may, and what becomes of it. */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "nsn_relay_internal.h"
#include "nsn_subject.h"

static bool begins(struct nsn_word word, const char *with)
{
    return word.length > strlen(with) && memcmp(word.at, with, strlen(with)) == 0;
}

static void tell_nobody_answers(struct nsn_relay *r, struct nsn_word subject, struct nsn_word reply)
{
    for (struct nsn_relay_subscription *one = r->subscriptions; one; one = one->next) {
        if (one->queue_length || one->ending || !nsn_pattern_matches(one->text, one->pattern_length, reply.at, reply.length))
            continue;
        char headers[LINE_MAX_BYTES + 64];
        int length = snprintf(headers, sizeof headers, "NATS/1.0 503\r\nNats-Subject: %.*s\r\n\r\n", (int)subject.length,
                              subject.at);
        nsn_relay_put_message(r, one->sid, reply, (struct nsn_word){"", 0}, (uint8_t *)headers, (size_t)length, NULL, 0);
        return;
    }
}

enum verdict { MAY, MAY_NOT, NOT_KNOWN_YET };

/* Whether it has the right to answer there, which comes with a message that reaches the client. What it sent to itself a line
 * ago lies in the fabric still, and a NATS server would have delivered it by now. */
static enum verdict may_answer(struct nsn_relay *r, struct nsn_word subject)
{
    uint64_t expires_ns;
    if (!nsn_permissions_answers(r->may, &expires_ns))
        return MAY_NOT;
    do {
        if (nsn_replies_answer(r->replies, r->may, subject.at, subject.length, nsn_now_ns()))
            return MAY;
    } while (nsn_relay_deliver(r));
    return nsn_relay_is_full(r) || nsn_receive_held(r->session) ? NOT_KNOWN_YET : MAY_NOT;
}

/* If it may not, the client is told so. */
static enum verdict may_publish(struct nsn_relay *r, struct nsn_word subject, struct nsn_word reply)
{
    bool reserved = begins(subject, "_GR_.") || begins(subject, "$GR.") || begins(subject, "$NRG.");
    bool may = !reserved && nsn_may_publish(r->may, subject.at, subject.length);
    enum verdict verdict = reserved ? MAY_NOT : may ? MAY : may_answer(r, subject);
    if (verdict == MAY_NOT)
        nsn_relay_say(r, "-ERR 'Permissions Violation for Publish to \"%.*s\"'\r\n", (int)subject.length, subject.at);
    if (verdict != MAY || !reply.length ||
        !(begins(reply, "_R_.") || begins(reply, "_GR_.") || begins(reply, "$GR.") || begins(reply, "$JS.ACK.")))
        return verdict;
    nsn_relay_say(r, "-ERR 'Permissions Violation for Publish with Reply of \"%.*s\"'\r\n", (int)reply.length, reply.at);
    return MAY_NOT;
}

static bool is_literal(struct nsn_word subject)
{
    return nsn_subject_routable(subject.at, subject.length) && !nsn_pattern_has_wildcard(subject.at, subject.length);
}

/* A subscriber's link is full. Past the deadline it is given up as a slow consumer, and the publish goes on without it. */
static enum nsn_relay_step wait_for_room(struct nsn_relay *r)
{
    uint64_t now = nsn_now_ns();
    if (!r->waits_since)
        r->waits_since = now;
    if (now - r->waits_since >= r->options->write_deadline_ns) {
        nsn_publish_give_up(r->session);
        r->waits_since = 0;
    }
    return WAIT;
}

/* What waiting does not help against. The shim knows the words in front, and does not end the connection for them. */
static void tell_that_it_failed(struct nsn_relay *r, struct nsn_word subject, int error)
{
    nsn_session_count_dropped(r->session);
    nsn_relay_say(r, "-ERR 'Message Not Delivered to \"%.*s\": ", (int)subject.length, subject.at);
    if (error == -ENOBUFS)
        nsn_relay_say(r, "subscribers that do not read hold the %" PRIu64 " MiB which the node keeps for this connection, "
                      "until they read or end'\r\n", r->options->budget >> 20);
    else
        nsn_relay_say(r, "%s'\r\n", nsn_session_error(r->session));
}

enum nsn_relay_step nsn_relay_publish(struct nsn_relay *r, struct nsn_word subject, struct nsn_word reply,
                                      const uint8_t *headers, size_t header_length, const uint8_t *payload,
                                      size_t payload_length)
{
    enum verdict verdict = r->checked ? MAY : may_publish(r, subject, reply);
    if (verdict != MAY)
        return verdict == MAY_NOT ? DONE : WAIT;
    if (!r->checked && r->pedantic && !is_literal(subject))
        nsn_relay_say(r, "-ERR 'Invalid Publish Subject'\r\n");
    r->checked = true;
    int result = nsn_publish(r->session, subject.at, subject.length, reply.at, reply.length, headers, header_length, payload,
                             payload_length);
    if (result == -EALREADY) {
        nsn_session_process(r->session, 0);
        return WAIT;
    }
    if (result == -EAGAIN)
        return wait_for_room(r);
    r->waits_since = 0;
    if (result < 0) {
        tell_that_it_failed(r, subject, result);
        return DONE;
    }
    nsn_relay_ok(r);
    if (result == 0 && reply.length && r->headers && r->no_responders)
        tell_nobody_answers(r, subject, reply);
    return DONE;
}
