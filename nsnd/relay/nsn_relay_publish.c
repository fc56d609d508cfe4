/* What the client publishes: whether it may, and what becomes of it. */
#include <errno.h>
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

/* Whether the client may; if not, it is told so. */
static bool may_publish(struct nsn_relay *r, struct nsn_word subject, struct nsn_word reply)
{
    if (begins(subject, "_GR_.") || begins(subject, "$GR.") || begins(subject, "$NRG.") ||
        (!nsn_may_publish(r->may, subject.at, subject.length) &&
         !nsn_replies_answer(r->replies, r->may, subject.at, subject.length, nsn_relay_now_ns()))) {
        nsn_relay_say(r, "-ERR 'Permissions Violation for Publish to \"%.*s\"'\r\n", (int)subject.length, subject.at);
        return false;
    }
    if (reply.length && (begins(reply, "_R_.") || begins(reply, "_GR_.") || begins(reply, "$GR.") || begins(reply, "$JS.ACK."))) {
        nsn_relay_say(r, "-ERR 'Permissions Violation for Publish with Reply of \"%.*s\"'\r\n", (int)reply.length, reply.at);
        return false;
    }
    return true;
}

static bool is_literal(struct nsn_word subject)
{
    return nsn_subject_routable(subject.at, subject.length) && !nsn_pattern_has_wildcard(subject.at, subject.length);
}

enum nsn_relay_step nsn_relay_publish(struct nsn_relay *r, struct nsn_word subject, struct nsn_word reply,
                                      const uint8_t *headers, size_t header_length, const uint8_t *payload,
                                      size_t payload_length)
{
    if (!r->checked && !may_publish(r, subject, reply))
        return DONE;
    if (!r->checked && r->pedantic && !is_literal(subject))
        nsn_relay_say(r, "-ERR 'Invalid Publish Subject'\r\n");
    r->checked = true;
    int result = nsn_publish(r->session, subject.at, subject.length, reply.at, reply.length, headers, header_length, payload,
                             payload_length);
    if (result == -EALREADY) {
        nsn_session_process(r->session, 0);
        return WAIT;
    }
    if (result == -EAGAIN) {
        if (!r->waits_since)
            r->waits_since = nsn_relay_now_ns();
        if (nsn_relay_now_ns() - r->waits_since < WRITE_DEADLINE_NS)
            return WAIT;
        nsn_publish_give_up(r->session);
        r->waits_since = 0;
        return WAIT;
    }
    r->waits_since = 0;
    nsn_relay_ok(r);
    if (result == 0 && reply.length && r->headers && r->no_responders)
        tell_nobody_answers(r, subject, reply);
    return DONE;
}
