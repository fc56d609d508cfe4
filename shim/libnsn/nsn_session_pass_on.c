/* Passing queue messages on: what reached a member that is removed, exhausted, given up or dead, or may not have it, goes to
 * another one of its group. They wait here, in order, while the others are full. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_session_out.h"

#define FORMERS_MAX 1024u /* removed subscriptions that are remembered of one consumer; above, the older ones are not */

static int pass_on_now(struct nsn_session *s, const struct nsn_passing *passing)
{
    const uint8_t *at = passing->bytes;
    struct nsn_parts parts = {
        .subject = (const char *)at,
        .reply = (const char *)at + passing->subject_length,
        .subject_length = passing->subject_length,
        .reply_length = passing->reply_length,
        .headers = at + passing->subject_length + passing->reply_length + passing->queue_length,
        .header_length = passing->header_length,
        .payload_length = passing->payload_length,
        .flags = NSN_RECORD_PASSED_ON,
        .over_slot = passing->over_slot,
        .over_generation = passing->over_generation,
    };
    parts.payload = parts.headers + parts.header_length;
    return nsn_deliver_queue(s, &parts, (const char *)at + passing->subject_length + passing->reply_length,
                             passing->queue_length, passing->sid);
}

static void take_first(struct nsn_session *s)
{
    struct nsn_passing *first = s->passing;
    s->passing = first->next;
    if (!s->passing)
        s->passing_last = &s->passing;
    s->passing_bytes -= first->header_length + first->payload_length;
    free(first);
}

/* When the first has waited for the whole write deadline, ns; UINT64_MAX: none waits. */
uint64_t nsn_pass_on_due(const struct nsn_session *s)
{
    return s->passing && s->passing->waits_since ? s->passing->waits_since + s->options.write_deadline_ns : UINT64_MAX;
}

/* All members of its group are full. True while it may wait. Then one after the other is given up, as by a publish, and what
 * goes to one that was is dropped and counted. */
static bool may_wait(struct nsn_session *s)
{
    uint64_t now = nsn_now_ns();
    if (!s->passing->waits_since)
        s->passing->waits_since = now;
    if (now < nsn_pass_on_due(s))
        return true;
    nsn_out_give_up(s, s->wait_slot);
    return false;
}

/* True when some could not be passed on yet. */
bool nsn_pass_on_waiting(struct nsn_session *s)
{
    while (s->passing) {
        uint64_t dropped = s->counters.dropped;
        int result = pass_on_now(s, s->passing);
        if (result == -EAGAIN) {
            if (may_wait(s))
                return true;
            continue;
        }
        if (result > 0 && s->counters.dropped == dropped)
            NSN_COUNT(s, passed_on, 1);
        else if (result < 0 || (result == 0 && s->passing->refused))
            NSN_COUNT(s, dropped, 1);
        take_first(s);
    }
    return false;
}

void nsn_pass_on_free(struct nsn_session *s)
{
    while (s->passing)
        take_first(s);
}

/* Keeps a copy of the record's message for another member. inside: its headers and payload, when they lie in a pool. NULL:
 * there is no memory for it, and it was dropped. */
struct nsn_passing *nsn_pass_on_queue(struct nsn_session *s, uint32_t sid, const struct nsn_record_view *view,
                                      const uint8_t *inside, const char *queue, size_t queue_length,
                                      uint32_t publisher_slot, uint32_t publisher_generation)
{
    const struct nsn_record *record = &view->record;
    size_t bytes = (size_t)record->subject_length + record->reply_length + queue_length + record->header_length +
                   record->payload_length;
    struct nsn_passing *passing = malloc(sizeof *passing + bytes);
    if (!passing) {
        NSN_COUNT(s, dropped, 1);
        return NULL;
    }
    *passing = (struct nsn_passing){
        .sid = sid,
        .subject_length = record->subject_length,
        .reply_length = record->reply_length,
        .queue_length = (uint16_t)queue_length,
        .header_length = record->header_length,
        .payload_length = record->payload_length,
        .over_slot = publisher_slot,
        .over_generation = record->flags & NSN_RECORD_NO_ECHO ? publisher_generation : 0,
    };
    uint8_t *at = passing->bytes;
    memcpy(at, view->subject, record->subject_length);
    memcpy(at += record->subject_length, view->reply, record->reply_length);
    memcpy(at += record->reply_length, queue, queue_length);
    at += queue_length;
    memcpy(at, inside ? inside : view->headers, record->header_length);
    memcpy(at + record->header_length, inside ? inside + record->header_length : view->payload, record->payload_length);
    *s->passing_last = passing;
    s->passing_last = &passing->next;
    s->passing_bytes += record->header_length + record->payload_length;
    return passing;
}

/* The bytes of an own pool record, or NULL. *segment is to be dropped. */
static const uint8_t *own_inside(struct nsn_session *s, const struct nsn_record_view *view, struct nsn_segment_in **segment)
{
    uint32_t index;
    uint64_t size, bytes = view->record.header_length + view->record.payload_length;
    int fd;
    char error[128];
    if (nsn_pool_segment(s->pool, view->pool_ref.segment, &index, &fd, &size) < 0 || view->pool_ref.offset > size ||
        bytes > size - view->pool_ref.offset ||
        nsn_segment_in_map(segment, fd, view->pool_ref.segment, size, error, sizeof error) < 0)
        return NULL;
    return (*segment)->data + view->pool_ref.offset;
}

/* The queue group that a record's subscription is, or was, of. */
static bool queue_of(struct nsn_session *s, const struct nsn_peer_out *peer, uint32_t sid, const char **queue, size_t *length)
{
    if (nsn_routes_queue_of(s->routes, (struct nsn_target){peer->slot, peer->generation, sid}, queue, length))
        return true;
    for (const struct nsn_former *former = peer->formers; former; former = former->next)
        if (former->sid == sid) {
            *queue = former->queue;
            *length = former->length;
            return true;
        }
    return false;
}

/* copy: headers and payload, when they came in parts. */
static void take_back_record(struct nsn_session *s, const struct nsn_peer_out *peer, const struct nsn_record_view *view,
                             const uint8_t *copy)
{
    struct nsn_segment_in *segment = NULL;
    const uint8_t *inside = copy;
    bool large = view->record.flags & NSN_RECORD_POOL;
    for (uint32_t i = 0; i < view->record.sid_count; i++) {
        const char *queue;
        size_t length;
        if (!queue_of(s, peer, view->sids[i], &queue, &length) || nsn_sid_named_before(view, i))
            continue;
        if (large && !inside && !(inside = own_inside(s, view, &segment))) {
            NSN_COUNT(s, dropped, 1);
            continue;
        }
        nsn_pass_on_queue(s, UINT32_MAX, view, inside, queue, length, s->slot, s->generation);
    }
    if (segment)
        nsn_segment_in_drop(segment);
}

/* The peer's session has ended: the queue messages that it did not read are another member's. What it scribbled into the
 * link may have made it unreadable; then they are lost with it. */
void nsn_pass_on_take_back(struct nsn_session *s, struct nsn_peer_out *peer)
{
    struct nsn_link_in *reader;
    struct nsn_record_view view;
    if (peer->parted)
        return;
    peer->parted = true;
    uint64_t left = nsn_link_out_pinned(peer->link); /* not what is behind: it may have died before it published its position */
    if (nsn_link_out_reader(peer->link, &reader, s->error, sizeof s->error) < 0)
        return;
    while (nsn_link_in_peek(reader, &view, UINT64_MAX) == 1) {
        uint64_t bytes = view.record.flags & NSN_RECORD_POOL ? view.record.header_length + view.record.payload_length : 0;
        bool refers = bytes && nsn_link_out_refers(peer->link, &view.pool_ref, bytes);
        if (refers && bytes > left) /* more than was written: it is what the other scribbled */
            break;
        left -= refers ? bytes : 0;
        uint8_t *copy = NULL;
        bool parts = view.record.flags & NSN_RECORD_PARTS;
        if (parts) {
            uint64_t inside = view.record.header_length + view.record.payload_length;
            copy = inside <= nsn_link_in_behind(reader) ? malloc(inside) : NULL;
            if (nsn_link_in_parts(reader, &view, copy) < 0) {
                free(copy);
                break;
            }
        }
        bool whole = parts ? copy != NULL : !bytes || refers; /* released: it has had the message, or passed it on */
        if (view.record.kind == NSN_RECORD_MESSAGE && whole)
            take_back_record(s, peer, &view, copy);
        free(copy);
        nsn_link_in_consume(reader);
    }
    nsn_link_in_destroy(reader);
}

void nsn_pass_on_forget(struct nsn_peer_out *peer)
{
    while (peer->formers) {
        struct nsn_former *former = peer->formers;
        peer->formers = former->next;
        free(former);
    }
    peer->former_count = 0;
}

/* A living member has left its group. It passes on itself what it has not read; but should it die before that, this session
 * takes it back, and must then know of which group it was. */
static void remember(struct nsn_session *s, struct nsn_peer_out *peer, uint32_t sid)
{
    const char *queue;
    size_t length;
    if (!nsn_link_out_behind(peer->link) || peer->former_count == FORMERS_MAX)
        nsn_pass_on_forget(peer);
    if (!nsn_link_out_behind(peer->link) ||
        !nsn_routes_queue_of(s->routes, (struct nsn_target){peer->slot, peer->generation, sid}, &queue, &length))
        return;
    struct nsn_former *former = malloc(sizeof *former + length);
    if (!former)
        return; /* only what it leaves unread when it dies is lost with it */
    *former = (struct nsn_former){.next = peer->formers, .sid = sid, .length = (uint32_t)length};
    memcpy(former->queue, queue, length);
    peer->formers = former;
    peer->former_count++;
}

/* nsn_routes_parting: interest is about to leave the routes: one subscription's, a session's, or all, to be read anew. */
void nsn_pass_on_parting(void *session, uint32_t slot, uint32_t generation, const uint32_t *sid)
{
    struct nsn_session *s = session;
    if (sid) {
        struct nsn_peer_out *peer = slot < NSN_SLOTS_MAX ? s->out[slot] : NULL;
        if (peer && peer->generation == generation && slot != s->slot)
            remember(s, peer, *sid);
        return;
    }
    if (slot < NSN_SLOTS_MAX) {
        struct nsn_peer_out *peer = s->out[slot];
        if (peer && peer->generation == generation && slot != s->slot)
            nsn_pass_on_take_back(s, peer);
        return;
    }
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        if (peer->slot != s->slot && !nsn_alive(s, peer->slot, peer->generation))
            nsn_pass_on_take_back(s, peer);
}
