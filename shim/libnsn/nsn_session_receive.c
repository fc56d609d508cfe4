/* Receiving: which links have something, in which order their records go to the subscriptions, and what becomes of records
 * that no subscription takes.
 *
 * Order: the clock is read, then the board, then the links' heads. A publisher that writes to several links says on the board
 * of each, before it writes to the first, that a message is under way; nothing later than that publish is dispatched until
 * it has come. What is left goes out by stamp, up to the clock as it was read. So a message never comes before one that caused
 * it: whatever an earlier stamp caused was announced before. A publisher that stands still is waited for only so long.
 * While all but one link are quiet, what is in that one goes out without the clock (nsn_look_for_one).
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_session_in.h"

#define NOT_IN_HEAP UINT64_MAX
#define QUIET_LOOKS 32u /* at the board, in a spin, between whole rounds */
#define BLOB_LEAST (64u << 10)

/* --- one record -------------------------------------------------------------------------------------------------- */

struct batch {
    struct nsn_message *messages;
    int count, most;
    uint64_t bytes;
    uint8_t *blob;
    size_t used, size;
};

/* Where a pool record's bytes lie, or NULL when the segment is not (or no longer) there. -EPROTO when they cannot lie there. */
static int find_inside(struct nsn_peer_in *peer, const struct nsn_record_view *view, struct nsn_segment_in **segment)
{
    struct nsn_segment_in **place = nsn_in_segment_place(peer, view->pool_ref.segment);
    *segment = place ? *place : NULL;
    if (!place)
        return 0;
    uint64_t bytes = view->record.header_length + view->record.payload_length;
    uint64_t size = (*segment)->size;
    return view->pool_ref.offset > size || bytes > size - view->pool_ref.offset ? -EPROTO : 1;
}

static void pass_on(struct nsn_session *s, const struct nsn_peer_in *peer, const struct nsn_subscription *subscription,
                    const struct nsn_record_view *view, const uint8_t *inside, bool refused)
{
    struct nsn_passing *passing = nsn_pass_on_queue(s, subscription->sid, view, inside,
                                                    subscription->names + subscription->pattern_length,
                                                    subscription->queue_length, peer->slot, peer->generation);
    if (passing)
        passing->refused = refused;
    nsn_pass_on_waiting(s);
}

/* subject: a copy that its publisher cannot change. */
static bool may_take(const struct nsn_session *s, const struct nsn_subscription *subscription, const char *subject,
                     size_t length)
{
    struct nsn_receiver asked = {.slot = s->slot, .generation = s->generation, .subject = subject,
                                 .queue = subscription->names + subscription->pattern_length, .subject_length = length,
                                 .queue_length = subscription->queue_length};
    return s->options.may_have(s->options.context, &asked);
}

/* The subscription takes it, or NULL: nobody of this session does. *passes: it is for another member of the group. */
static struct nsn_subscription *taker(struct nsn_session *s, uint32_t sid, struct nsn_subscription **passes)
{
    struct nsn_subscription *subscription = nsn_subscription_find(s, sid);
    *passes = NULL;
    if (!subscription)
        return NULL;
    if (subscription->state == NSN_SUB_GHOST) {
        *passes = subscription;
        return NULL;
    }
    return subscription;
}

static uint32_t took(struct nsn_session *s, struct nsn_subscription *subscription)
{
    subscription->delivered++;
    if (!subscription->max || subscription->delivered < subscription->max)
        return 0;
    if (subscription->state == NSN_SUB_LIVE)
        nsn_interest_queue(s, NSN_INTEREST_REMOVE, subscription->sid, "", 0, "", 0);
    nsn_subscription_remove(s, subscription);
    return NSN_MESSAGE_LAST;
}

/* Copies what goes into the blob; returns its offset. The producer may change these bytes while they are copied: whatever
 * comes out is what this session sees, once. */
static inline __attribute__((always_inline)) uint32_t to_blob(struct batch *batch, const struct nsn_record_view *view,
                                                              bool large)
{
    const struct nsn_record *record = &view->record;
    uint32_t offset = (uint32_t)batch->used;
    size_t length = record->subject_length + record->reply_length;
    if (!large)
        length += record->header_length + record->payload_length;
    memcpy(batch->blob + offset, view->subject, length); /* they lie one behind another */
    batch->used += length;
    return offset;
}

/* Another user's publisher may name any subscription; it gets to those only what they are for. */
static bool is_for(const struct nsn_subscription *subscription, const char *subject, size_t length)
{
    return nsn_subject_routable(subject, length) &&
           nsn_pattern_matches(subscription->names, subscription->pattern_length, subject, length);
}

/* Gathers a message that came in parts. 1, 0 when there was no memory for it (it is passed over), -EPROTO. */
static __attribute__((noinline)) int gather_parts(struct nsn_peer_in *peer, const struct nsn_record_view *view, uint8_t **copy)
{
    uint64_t bytes = view->record.header_length + view->record.payload_length;
    if (bytes > nsn_link_in_behind(peer->link))
        return -EPROTO;
    *copy = malloc(bytes);
    int result = nsn_link_in_parts(peer->link, view, *copy);
    if (result == 1 && !*copy)
        return 0;
    if (result < 0) {
        free(*copy);
        *copy = NULL;
    }
    return result;
}

/* 1: consumed. 0: no room in the batch, or it must wait. -EPROTO. */
static int take_record(struct nsn_session *s, struct nsn_peer_in *peer, const struct nsn_record_view *view, struct batch *batch)
{
    const struct nsn_record *record = &view->record;
    if (record->kind == NSN_RECORD_SEGMENT_GONE) {
        nsn_in_segment_gone(peer, view->pool_ref.segment);
        return 1;
    }
    if (record->kind != NSN_RECORD_MESSAGE)
        return -EPROTO;
    bool pool = record->flags & NSN_RECORD_POOL, parts = record->flags & NSN_RECORD_PARTS, large = pool || parts;
    if (pool && peer->stranger) /* nor can it have any of this session's user */
        return -EPROTO;
    size_t need = (size_t)record->subject_length + record->reply_length +
                  (large ? 0 : record->header_length + record->payload_length);
    if (batch->count + record->sid_count > batch->most || batch->used + need > batch->size)
        return 0;
    struct nsn_segment_in *segment = NULL;
    const uint8_t *inside = NULL;
    uint8_t *copy = NULL;
    if (parts) {
        int found = gather_parts(peer, view, &copy);
        if (found < 0)
            return found;
        if (!found) {
            NSN_COUNT(s, discarded, record->sid_count);
            return 1;
        }
        inside = copy;
    }
    if (pool) {
        int found = find_inside(peer, view, &segment);
        if (found < 0)
            return found;
        if (!found && !peer->gone) {
            peer->blocked = true;
            return 0;
        }
        if (!found) { /* the segment was lost with its producer and nsnd */
            NSN_COUNT(s, discarded, record->sid_count);
            nsn_link_in_release(peer->link, view->pool_ref.ref, view->pool_ref.use);
            return 1;
        }
        inside = segment->data + view->pool_ref.offset;
    }
    uint32_t offset = UINT32_MAX, handle = UINT32_MAX, takers = 0;
    size_t used = batch->used;
    if (peer->stranger || s->options.may_have)
        offset = to_blob(batch, view, large);
    for (uint32_t i = 0; i < record->sid_count; i++) {
        struct nsn_subscription *passes, *subscription = taker(s, view->sids[i], &passes);
        bool refused = subscription && s->options.may_have &&
                       !may_take(s, subscription, (const char *)batch->blob + offset, record->subject_length);
        if (refused) {
            passes = subscription->queue_length ? subscription : NULL;
            subscription = NULL;
        }
        if (passes && nsn_sid_named_before(view, i)) {
            free(copy);
            return -EPROTO;
        }
        if (passes)
            pass_on(s, peer, passes, view, inside, refused);
        if (!subscription)
            continue;
        if (peer->stranger && !is_for(subscription, (const char *)batch->blob + offset, record->subject_length)) {
            NSN_COUNT(s, discarded, 1);
            continue;
        }
        if (offset == UINT32_MAX)
            offset = to_blob(batch, view, large);
        if (large && handle == UINT32_MAX) {
            nsn_in_lend(s, peer, view, segment, inside, &copy, &handle);
            if (handle == UINT32_MAX)
                continue;
        }
        if (large)
            s->larges[handle].holds++;
        takers++;
        batch->messages[batch->count++] = (struct nsn_message){
            .sid = view->sids[i],
            .flags = took(s, subscription) | (large ? NSN_MESSAGE_LARGE : 0),
            .offset = offset,
            .subject_length = record->subject_length,
            .reply_length = record->reply_length,
            .header_length = record->header_length,
            .payload_length = (uint32_t)record->payload_length,
            .large = handle,
        };
    }
    if (pool && handle == UINT32_MAX)
        nsn_link_in_release(peer->link, view->pool_ref.ref, view->pool_ref.use);
    free(copy); /* nobody took it */
    if (!takers)
        batch->used = used;
    s->counters.messages_in += takers;
    batch->bytes += record->payload_length;
    s->counters.bytes_in += takers * (record->header_length + record->payload_length);
    return 1;
}

/* This session was given up by a publisher: everything up to the mark goes, but queue messages go to others. */
static void discard(struct nsn_session *s, struct nsn_peer_in *peer, uint64_t mark)
{
    struct nsn_record_view view;
    uint64_t messages = 0, dropped = 0, passed_on = s->counters.passed_on;
    int result = 0;
    while (nsn_link_in_head(peer->link) < mark && (result = nsn_link_in_peek(peer->link, &view, UINT64_MAX)) == 1) {
        if (view.record.kind == NSN_RECORD_SEGMENT_GONE) {
            nsn_in_segment_gone(peer, view.pool_ref.segment);
        } else {
            struct nsn_segment_in *segment = NULL;
            uint8_t *copy = NULL;
            bool large = view.record.flags & NSN_RECORD_POOL;
            bool readable = !large || find_inside(peer, &view, &segment) == 1;
            if ((large && peer->stranger) || view.record.kind != NSN_RECORD_MESSAGE)
                result = -EPROTO;
            else if (view.record.flags & NSN_RECORD_PARTS) {
                result = gather_parts(peer, &view, &copy);
                readable = result == 1;
            }
            if (result < 0)
                break;
            const uint8_t *inside = large && readable ? segment->data + view.pool_ref.offset : copy;
            for (uint32_t i = 0; i < view.record.sid_count; i++) {
                const struct nsn_subscription *subscription = nsn_subscription_find(s, view.sids[i]);
                messages++;
                if (subscription && subscription->queue_length && readable && s->passing_bytes < NSN_PASSING_BYTES)
                    pass_on(s, peer, subscription, &view, inside, false);
            }
            free(copy);
            if (large)
                nsn_link_in_release(peer->link, view.pool_ref.ref, view.pool_ref.use);
        }
        nsn_link_in_consume(peer->link);
        if (s->counters.passed_on != passed_on)
            nsn_in_show_progress(s, peer);
        passed_on = s->counters.passed_on;
    }
    if (result < 0) {
        nsn_in_broken(s, peer, "its records are impossible");
        return;
    }
    nsn_in_show_progress(s, peer); /* the position first: the publisher looks for room as soon as it sees the answer */
    nsn_link_in_acknowledge_stall(peer->link, &dropped);
    NSN_COUNT(s, discarded, messages + dropped);
    NSN_COUNT(s, slow_consumer, 1);
    struct nsn_event event = {.kind = NSN_EVENT_SLOW_CONSUMER, .slot = peer->slot, .number = messages + dropped};
    snprintf(event.text, sizeof event.text, "slow consumer: %llu messages of the publisher in slot %u were dropped",
             (unsigned long long)(messages + dropped), peer->slot);
    nsn_post_event(s, &event);
    nsn_in_show_progress(s, peer);
}

/* What its producer was dropping just when this session answered: a publish that had begun before. */
static void count_late_drops(struct nsn_session *s, struct nsn_peer_in *peer)
{
    uint64_t dropped = nsn_link_in_late_drops(peer->link);
    if (!dropped)
        return;
    NSN_COUNT(s, discarded, dropped);
    struct nsn_event event = {.kind = NSN_EVENT_SLOW_CONSUMER, .slot = peer->slot, .number = dropped};
    snprintf(event.text, sizeof event.text, "slow consumer: %llu more messages of the publisher in slot %u were dropped",
             (unsigned long long)dropped, peer->slot);
    nsn_post_event(s, &event);
}

/* --- order ------------------------------------------------------------------------------------------------------- */

static void sift_down(struct nsn_session *s, uint32_t count, uint32_t at)
{
    for (;;) {
        uint32_t child = 2 * at + 1;
        if (child >= count)
            return;
        if (child + 1 < count && s->active_stamp[child + 1] < s->active_stamp[child])
            child++;
        if (s->active_stamp[at] <= s->active_stamp[child])
            return;
        uint64_t stamp = s->active_stamp[at];
        struct nsn_peer_in *peer = s->active[at];
        s->active_stamp[at] = s->active_stamp[child];
        s->active[at] = s->active[child];
        s->active_stamp[child] = stamp;
        s->active[child] = peer;
        at = child;
    }
}

/* Drops what is over, discards for whom this session was too slow, and leaves the heads' stamps in a heap. */
static void gather(struct nsn_session *s, uint64_t now)
{
    for (uint32_t i = 0; i < s->active_count;) {
        struct nsn_peer_in *peer = s->active[i];
        uint64_t mark = nsn_link_in_stalled(peer->link), stamp = NOT_IN_HEAP;
        if (mark) {
            discard(s, peer, mark);
            if (i >= s->active_count || s->active[i] != peer)
                continue; /* it was broken and is gone */
        } else {
            count_late_drops(s, peer);
        }
        int there = nsn_link_in_stamp(peer->link, &stamp);
        if (there < 0) {
            nsn_in_broken(s, peer, "its positions are impossible");
            continue;
        }
        if (there && stamp > now + NSN_HOLD_NS && stamp > nsn_now_ns() + NSN_HOLD_NS) { /* it would be held back for ever */
            nsn_in_broken(s, peer, "its messages are stamped in the future; has its time namespace another clock?");
            continue;
        }
        if (there == 0) {
            if (peer->gone && nsn_link_in_empty(peer->link))
                nsn_in_drop(s, peer);
            else
                nsn_in_deactivate(s, peer);
            continue;
        }
        s->active_stamp[i++] = stamp;
    }
    for (uint32_t i = s->active_count / 2; i-- > 0;)
        sift_down(s, s->active_count, i);
}

/* After the last record of a round: positions are published, empty links leave the list. */
static void settle(struct nsn_session *s, struct nsn_peer_in **touched, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        nsn_in_show_progress(s, touched[i]);
}

static bool takes_more(const struct nsn_session *s, const struct batch *batch)
{
    return batch->count < batch->most && batch->bytes < NSN_BATCH_BYTES && s->passing_bytes < NSN_PASSING_BYTES;
}

/* A link's next record goes to its subscriptions. 1; 0: not now; -EPROTO. limit_stamp: as nsn_link_in_peek. */
static int take_next(struct nsn_session *s, struct nsn_peer_in *peer, struct batch *batch, uint64_t limit_stamp)
{
    struct nsn_record_view view;
    uint64_t passed_on = s->counters.passed_on;
    int result = nsn_link_in_peek(peer->link, &view, limit_stamp);
    if (result == 1)
        result = take_record(s, peer, &view, batch);
    if (result != 1)
        return result;
    peer->blocked_since = 0;
    nsn_link_in_consume(peer->link);
    if (s->counters.passed_on != passed_on) /* at once: who dies in between has passed one on twice, not many */
        nsn_in_show_progress(s, peer);
    return 1;
}

/* The only link with something in it. False: its next record is one for the long way, which asks the clock. */
static bool take_one(struct nsn_session *s, struct nsn_peer_in *peer, uint64_t end, struct batch *batch)
{
    uint64_t begin = nsn_link_in_head(peer->link);
    int result = 1;
    count_late_drops(s, peer);
    while (result == 1 && nsn_link_in_head(peer->link) != end && takes_more(s, batch))
        result = take_next(s, peer, batch, s->clock + NSN_HOLD_NS); /* one stamped later may be of another clock */
    nsn_in_show_progress(s, peer);
    bool all = nsn_link_in_head(peer->link) == end, some = nsn_link_in_head(peer->link) != begin;
    if (result < 0)
        nsn_in_broken(s, peer, "its records are impossible");
    else if (all)
        nsn_in_deactivate(s, peer); /* what comes behind is announced by a word that has not been seen */
    return result < 0 || all || some;
}

static void merge(struct nsn_session *s, struct batch *batch, uint64_t latest)
{
    struct nsn_peer_in *touched[64];
    uint32_t touched_count = 0, heap = s->active_count;
    while (heap && takes_more(s, batch)) {
        struct nsn_peer_in *peer = s->active[0];
        if (s->active_stamp[0] > latest) {
            s->held = true;
            break;
        }
        int result = peer->blocked ? 0 : take_next(s, peer, batch, UINT64_MAX);
        if (result < 0) {
            settle(s, touched, touched_count);
            nsn_in_broken(s, peer, "its records are impossible");
            return;
        }
        if (result == 0 && peer->blocked) {
            uint64_t now = nsn_now_ns();
            if (!peer->blocked_since)
                peer->blocked_since = now;
            settle(s, touched, touched_count);
            touched_count = 0;
            if (s->state == NSN_READY && nsn_control_receive(s) > 0)
                return; /* links and segments may have come, or all be gone: begin anew */
            if (now - peer->blocked_since < NSN_HANDOVER_NS)
                break; /* nothing later may go before it */
            s->active_stamp[0] = NOT_IN_HEAP; /* too long: others are not to suffer */
            sift_down(s, heap, 0);
            if (s->active_stamp[0] == NOT_IN_HEAP)
                break;
            continue;
        }
        if (result == 0)
            break; /* the batch is full */
        bool known = false;
        for (uint32_t i = 0; i < touched_count && !known; i++)
            known = touched[i] == peer;
        if (!known) {
            if (touched_count == 64) {
                settle(s, touched, touched_count);
                touched_count = 0;
            }
            touched[touched_count++] = peer;
        }
        uint64_t stamp;
        result = nsn_link_in_stamp(peer->link, &stamp);
        s->active_stamp[0] = result == 1 ? stamp : NOT_IN_HEAP;
        sift_down(s, heap, 0);
        if (s->active_stamp[0] == NOT_IN_HEAP)
            break;
    }
    settle(s, touched, touched_count);
}

static void take_in_order(struct nsn_session *s, struct batch *batch)
{
    uint64_t now = s->clock = nsn_now_ns();
    nsn_look(s, now);
    if (s->announced_since && nsn_in_announced(s, now)) {
        s->held = true;
        return;
    }
    if (!s->active_count)
        return;
    uint64_t latest = s->latest; /* also with one link: what caused its records may be in one that is not here yet */
    gather(s, now);
    if (s->active_count)
        merge(s, batch, latest);
}

static int receive_once(struct nsn_session *s, struct batch *batch)
{
    s->held = false;
    if (nsn_pass_on_waiting(s) && s->passing_bytes >= NSN_PASSING_BYTES)
        return 0;
    struct nsn_peer_in *one;
    uint64_t end;
    enum nsn_sight sight = nsn_look_for_one(s, &one, &end);
    if (sight == NSN_SIGHT_NOTHING)
        return 0;
    if (sight == NSN_SIGHT_UNCLEAR || !take_one(s, one, end, batch))
        take_in_order(s, batch);
    if (batch->count) {
        nsn_store_relaxed(&s->page->counters.messages_in, s->counters.messages_in);
        nsn_store_relaxed(&s->page->counters.bytes_in, s->counters.bytes_in);
    }
    return batch->count;
}

/* True when the spin should end: something for the caller that is not a message. */
static bool attention(struct nsn_session *s) { return s->event_count || (s->waiting && s->outs); }

int nsn_receive(struct nsn_session *s, struct nsn_message *messages, int most, uint8_t *blob, size_t blob_size,
                uint64_t spin_ns)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    if (most < (int)NSN_RECORD_SIDS || blob_size < BLOB_LEAST)
        return nsn_fail(s, -EINVAL, "a receiver needs room for %u messages and %u bytes", NSN_RECORD_SIDS, BLOB_LEAST);
    struct batch batch = {.messages = messages, .most = most, .blob = blob, .size = blob_size};
    uint64_t until = 0;
    for (uint32_t round = 0;; round++) {
        pthread_mutex_lock(&s->lock);
        int count = 0;
        bool stop = !s->page;
        if (s->page) {
            nsn_sleep_end(s->page, &s->sleep_number);
            count = receive_once(s, &batch);
            if (count && s->batch)
                nsn_interest_flush(s); /* maxima were reached */
            stop = attention(s);
            if (!count && (round & 31) == 31)
                stop |= nsn_control_receive(s) != 0;
        }
        bool held = s->held;
        pthread_mutex_unlock(&s->lock);
        if (count || stop)
            return count;
        if (!spin_ns && !(held && round < 64))
            return 0;
        uint64_t now = nsn_now_ns();
        if (!until)
            until = now + (spin_ns ? spin_ns : 20000);
        if (now >= until)
            return 0;
        for (uint32_t i = 0; i < (held ? 1 : QUIET_LOOKS) && nsn_is_quiet(s); i++)
            nsn_cpu_relax();
    }
}

int nsn_receive_held(struct nsn_session *s) { return s->held || s->passing; }
