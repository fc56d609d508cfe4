/* The client's subscriptions, and what the fabric has for them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_relay_internal.h"
#include "nsn_subject.h"

static uint64_t hash_of(uint32_t sid) { return nsn_mix(sid ^ 0xa0761d6478bd642full, 0xe7037ed1a0b428dbull); }

static struct nsn_relay_subscription *find(struct nsn_relay *r, uint32_t sid)
{
    struct nsn_item *item = nsn_table_first(&r->by_sid, hash_of(sid));
    while (item && nsn_container_of(item, struct nsn_relay_subscription, item)->sid != sid)
        item = nsn_table_next(item);
    return item ? nsn_container_of(item, struct nsn_relay_subscription, item) : NULL;
}

static void add_subscription(struct nsn_relay *r, struct nsn_relay_subscription *one)
{
    one->at = r->last_subscription;
    *one->at = one;
    r->last_subscription = &one->next;
    nsn_table_insert(&r->by_sid, &one->item, hash_of(one->sid));
}

static void remove_subscription(struct nsn_relay *r, struct nsn_relay_subscription *gone)
{
    *gone->at = gone->next;
    if (gone->next)
        gone->next->at = gone->at;
    else
        r->last_subscription = gone->at;
    nsn_table_remove(&r->by_sid, &gone->item);
    nsn_unsubscribe(r->session, gone->sid, 0);
    if (gone->ending) {
        nsn_barrier_cancel(r->session, gone->ending);
        r->ending--;
    }
    free(gone);
}

void nsn_relay_free_subscriptions(struct nsn_relay *r)
{
    for (struct nsn_relay_subscription *one; (one = r->subscriptions);) {
        r->subscriptions = one->next;
        free(one);
    }
    nsn_table_free(&r->by_sid);
}

void nsn_relay_subscribe(struct nsn_relay *r, uint32_t sid, struct nsn_word pattern, struct nsn_word queue)
{
    struct nsn_relay_subscription *known = find(r, sid);
    if (known && known->ending)
        remove_subscription(r, known);
    else if (known) {
        nsn_relay_ok(r);
        return;
    }
    char of_queue[LINE_MAX_BYTES + 32] = "";
    if (queue.length)
        snprintf(of_queue, sizeof of_queue, " using queue \"%.*s\"", (int)queue.length, queue.at);
    bool reserved = queue.length == 5 && memcmp(queue.at, "_sys_", 5) == 0;
    if (!nsn_pattern_valid(pattern.at, pattern.length)) {
        nsn_relay_say(r, "-ERR 'Invalid Subject'\r\n");
        return;
    }
    if (reserved || !nsn_may_subscribe(r->may, pattern.at, pattern.length, queue.at, queue.length)) {
        nsn_relay_say(r, "-ERR 'Permissions Violation for Subscription to \"%.*s\"%s'\r\n", (int)pattern.length, pattern.at,
                      of_queue);
        return;
    }
    bool room = r->by_sid.count < r->options->subscriptions_max;
    struct nsn_relay_subscription *one = room ? malloc(sizeof *one + pattern.length + queue.length) : NULL;
    if (!one) {
        nsn_relay_say(r, "-ERR 'maximum subscriptions exceeded'\r\n");
        return;
    }
    *one = (struct nsn_relay_subscription){.sid = sid, .pattern_length = pattern.length, .queue_length = queue.length};
    memcpy(one->text, pattern.at, pattern.length);
    memcpy(one->text + pattern.length, queue.at, queue.length);
    if (nsn_subscribe(r->session, sid, pattern.at, pattern.length, queue.at, queue.length) < 0) {
        free(one);
        nsn_relay_say(r, "-ERR 'maximum subscriptions exceeded'\r\n");
        return;
    }
    add_subscription(r, one);
    nsn_relay_ok(r);
}

/* What was published before still goes to it: a client that drains has all of that in front of its next PONG. */
void nsn_relay_unsubscribe(struct nsn_relay *r, uint32_t sid, int64_t most)
{
    struct nsn_relay_subscription *one = find(r, sid);
    if (one && !one->ending && most > 0 && one->delivered < (uint64_t)most)
        nsn_unsubscribe(r->session, sid, (uint64_t)most);
    else if (one && !one->ending && nsn_drain(r->session, sid) == 0) {
        one->ending = nsn_barrier_begin(r->session);
        r->ending++;
    }
    nsn_relay_ok(r);
}

/* Subscriptions whose last message has come. */
void nsn_relay_end_subscriptions(struct nsn_relay *r)
{
    for (struct nsn_relay_subscription *one = r->subscriptions, *next; r->ending && one; one = next) {
        next = one->next;
        if (one->ending && nsn_barrier_done(r->session, one->ending) != 0)
            remove_subscription(r, one); /* cancelling a barrier that is done does nothing */
    }
}

/* What may not be heard any more ends, and the client is told so. */
void nsn_relay_renew_permissions(struct nsn_relay *r)
{
    const struct nsn_permissions *now = nsn_relay_permissions(r->options);
    if (now == r->may)
        return;
    r->may = now;
    r->checked = false;
    for (struct nsn_relay_subscription *one = r->subscriptions, *next; one; one = next) {
        next = one->next;
        const char *queue = one->text + one->pattern_length;
        if (one->ending || nsn_may_subscribe(r->may, one->text, one->pattern_length, queue, one->queue_length))
            continue;
        nsn_relay_say(r, "-ERR 'Permissions Violation for Subscription to \"%.*s\"", (int)one->pattern_length, one->text);
        if (one->queue_length)
            nsn_relay_say(r, " using queue \"%.*s\"", (int)one->queue_length, queue);
        nsn_relay_say(r, " (sid \"%u\")'\r\n", one->sid);
        remove_subscription(r, one);
    }
}

/* --- delivery ------------------------------------------------------------------------------------------------------- */

/* In a line it is one word: whoever publishes may write anything there. */
static bool is_word(struct nsn_word word)
{
    for (size_t i = 0; i < word.length; i++)
        if (word.at[i] == ' ' || word.at[i] == '\t' || word.at[i] == '\r' || word.at[i] == '\n')
            return false;
    return true;
}

static void deliver_one(struct nsn_relay *r, const struct nsn_message *message)
{
    const uint8_t *at = r->blob + message->offset;
    struct nsn_word subject = {(const char *)at, message->subject_length};
    struct nsn_word reply = {subject.at + subject.length, message->reply_length};
    const uint8_t *headers = (const uint8_t *)reply.at + reply.length;
    if (message->flags & NSN_MESSAGE_LARGE)
        headers = nsn_large(r->session, message->large);
    const uint8_t *payload = headers ? headers + message->header_length : NULL;
    struct nsn_relay_subscription *subscription = find(r, message->sid);
    if (headers && subscription && is_word(subject) && is_word(reply)) {
        nsn_relay_put_message(r, message->sid, subject, reply, headers, message->header_length, payload,
                              message->payload_length);
        if (reply.length)
            nsn_replies_heard(r->replies, r->may, reply.at, reply.length, nsn_now_ns());
    } else if (subscription) {
        nsn_session_count_dropped(r->session);
    }
    if (message->flags & NSN_MESSAGE_LARGE)
        nsn_large_release(r->session, message->large);
    if (subscription && ++subscription->delivered && (message->flags & NSN_MESSAGE_LAST))
        remove_subscription(r, subscription);
}

/* What the fabric has for the client, unless that does not read. True when there was something. */
bool nsn_relay_deliver(struct nsn_relay *r)
{
    if (nsn_relay_is_full(r)) {
        if (!r->unread_since)
            r->unread_since = nsn_now_ns();
        r->over |= nsn_now_ns() - r->unread_since > r->options->write_deadline_ns; /* a slow consumer */
        return false;
    }
    if (!nsn_relay_holds(r)) {
        r->next = 0;
        r->count = nsn_receive(r->session, r->messages, BATCH, r->blob, sizeof r->blob, 0);
        r->over |= r->count < 0;
    }
    bool some = nsn_relay_holds(r);
    while (nsn_relay_holds(r) && !nsn_relay_is_full(r)) /* a batch may have one large message for many subscriptions */
        deliver_one(r, &r->messages[r->next++]);
    return some;
}
