/* Publishing: when there is a plan, and all of it has room, the message is written into the links.
 *
 * Nothing is written before every link of the plan has room, so a publish that has to wait can simply be made again.
 */
#include <errno.h>
#include <string.h>

#include "nsn_session_out.h"

/* Shows that this session is inside a publish. The fence pairs with those of barriers and trimming: whoever changed something
 * before it looked at this word either sees it set, or the change is seen by the loads that follow here. */
uint64_t nsn_publish_enter(struct nsn_session *s)
{
    uint64_t now = nsn_now_ns();
    s->last_stamp = now > s->last_stamp ? now : s->last_stamp + 1;
    nsn_store_relaxed(&s->page->publishing, s->last_stamp);
    nsn_fence();
    return s->last_stamp;
}

void nsn_publish_leave(struct nsn_session *s)
{
    nsn_store_release(&s->page->publishing, 0); /* pairs with the acquire loads of barriers and receivers */
}

/* --- writing ----------------------------------------------------------------------------------------------------- */

NSN_ON_THE_WAY uint8_t *write_front(struct nsn_peer_out *peer, const struct nsn_parts *parts, const struct nsn_target *targets,
                                    uint32_t count, uint32_t length, uint8_t flags)
{
    uint8_t *at = nsn_link_out_reserve(peer->link, length);
    nsn_make_in_shared(struct nsn_record, at,
        .length = length,
        .kind = NSN_RECORD_MESSAGE,
        .flags = (uint8_t)(parts->flags | flags),
        .sid_count = (uint16_t)count,
        .subject_length = parts->subject_length,
        .reply_length = parts->reply_length,
        .header_length = parts->header_length,
        .payload_length = parts->payload_length,
        .stamp = parts->stamp,
    );
    at += sizeof(struct nsn_record);
    if (count == 1) { /* mostly: and no call */
        nsn_copy_to_shared(at, &targets->sid, sizeof targets->sid);
        return at + NSN_ALIGN8(sizeof targets->sid);
    }
    uint32_t sids[NSN_RECORD_SIDS];
    for (uint32_t i = 0; i < count; i++)
        sids[i] = targets[i].sid;
    nsn_copy_to_shared(at, sids, 4 * count);
    return at + NSN_ALIGN8(4 * count);
}

NSN_ON_THE_WAY uint8_t *write_names(uint8_t *at, const struct nsn_parts *parts)
{
    nsn_copy_to_shared(at, parts->subject, parts->subject_length);
    at += parts->subject_length;
    nsn_copy_to_shared(at, parts->reply, parts->reply_length);
    return at + parts->reply_length;
}

static void write_record(struct nsn_session *s, struct nsn_peer_out *peer, const struct nsn_parts *parts,
                         const struct nsn_target *targets, uint32_t count)
{
    bool pool = parts->block && !peer->copies;
    uint32_t length = nsn_parts_record_bound(parts, peer, count);
    uint8_t *at = write_front(peer, parts, targets, count, length, pool ? NSN_RECORD_POOL : 0);
    s->written += length;
    if (pool) {
        struct nsn_pool_ref ref = {.segment = parts->block->segment, .offset = parts->block->offset};
        nsn_link_out_refer(peer->link, parts->block, nsn_parts_bytes(parts), &ref);
        nsn_copy_to_shared(at, &ref, sizeof ref);
        at += sizeof ref;
    }
    at = write_names(at, parts);
    if (!pool) {
        nsn_copy_to_shared(at, parts->headers, parts->header_length);
        nsn_copy_to_shared(at + parts->header_length, parts->payload, parts->payload_length);
    }
    nsn_link_out_commit(peer->link);
}

static void write_part(struct nsn_peer_out *peer, const struct nsn_parts *parts, uint64_t done, uint32_t bytes)
{
    struct nsn_record record = {.length = NSN_ALIGN8((uint32_t)sizeof record + bytes), .kind = NSN_RECORD_PART,
                                .payload_length = bytes, .stamp = parts->stamp};
    uint8_t *at = nsn_link_out_reserve(peer->link, record.length);
    nsn_copy_to_shared(at, &record, sizeof record);
    at += sizeof record;
    if (done < parts->header_length) {
        uint32_t headers = parts->header_length - (uint32_t)done < bytes ? parts->header_length - (uint32_t)done : bytes;
        nsn_copy_to_shared(at, parts->headers + done, headers);
        at += headers, bytes -= headers, done += headers;
    }
    if (bytes) /* done: at least header_length */
        nsn_copy_to_shared(at, parts->payload + (done - parts->header_length), bytes);
    nsn_link_out_append(peer->link);
}

/* Written, and not visible yet: it takes long, and is to be there as a whole, or not at all when this session dies. */
static void write_in_parts(struct nsn_session *s, struct nsn_peer_out *peer, const struct nsn_parts *parts,
                           const struct nsn_target *targets, uint32_t count)
{
    uint32_t length = NSN_ALIGN8(nsn_parts_front_bytes(parts, count));
    write_names(write_front(peer, parts, targets, count, length, NSN_RECORD_PARTS), parts);
    nsn_link_out_append(peer->link);
    uint64_t all = nsn_parts_bytes(parts);
    s->written += all;
    for (uint64_t done = 0; done < all; done += NSN_PART_BYTES)
        write_part(peer, parts, done, all - done < NSN_PART_BYTES ? (uint32_t)(all - done) : NSN_PART_BYTES);
}

/* The copies for other users come first, before anything of this publish can be seen. */
static void write_copies(struct nsn_session *s, const struct nsn_parts *parts)
{
    for (uint32_t g = 0; g < s->group_count; g++) {
        const struct nsn_group *group = &s->groups[g];
        for (uint32_t i = 0; !group->drop && nsn_parts_split(parts, group->peer) && i < group->count; i += NSN_RECORD_SIDS) {
            uint32_t left = group->count - i;
            write_in_parts(s, group->peer, parts, &s->plan[group->first + i], left < NSN_RECORD_SIDS ? left : NSN_RECORD_SIDS);
        }
    }
}

/* The consumer may have answered since it was found stalled, and counted without this. Then it is to look again. */
static void drop_for_stalled(struct nsn_session *s, struct nsn_group *group)
{
    nsn_link_out_drop(group->peer->link, group->count);
    nsn_fence(); /* pairs with the one in nsn_link_in_acknowledge_stall: it has seen this drop, or we see its answer */
    group->late = !nsn_link_out_stalled(group->peer->link);
    if (group->late)
        nsn_out_nudge(s, group->peer);
}

/* Returns for how many subscriptions. */
static int write_plan(struct nsn_session *s, const struct nsn_parts *parts)
{
    int reached = 0;
    uint64_t records = 0, dropped = 0;
    for (uint32_t g = 1; g < s->group_count; g++) /* ordered before the first record by its release store */
        if (!s->groups[g].drop)
            nsn_out_announce(s, s->groups[g].peer, true);
    if (nsn_parts_are_large(parts))
        write_copies(s, parts);
    for (uint32_t g = 0; g < s->group_count; g++) {
        struct nsn_group *group = &s->groups[g];
        struct nsn_peer_out *peer = group->peer;
        reached += (int)group->count;
        if (!group->drop && parts->block && !peer->copies && nsn_out_show_segment(s, peer, parts->block->segment) < 0) {
            group->drop = true;
            nsn_out_announce(s, peer, false);
        }
        if (group->drop) {
            dropped += group->count;
            if (group->stalled)
                drop_for_stalled(s, group);
            continue;
        }
        bool written = nsn_parts_split(parts, peer);
        if (written) {
            nsn_link_out_reveal(peer->link);
            records += (group->count + NSN_RECORD_SIDS - 1) / NSN_RECORD_SIDS;
        }
        for (uint32_t i = 0; !written && i < group->count; i += NSN_RECORD_SIDS) {
            uint32_t left = group->count - i;
            write_record(s, peer, parts, &s->plan[group->first + i], left < NSN_RECORD_SIDS ? left : NSN_RECORD_SIDS);
            records++;
        }
        nsn_out_announce(s, peer, false);
        if (peer->want) {
            peer->want = false;
            nsn_link_out_unwant(peer->link);
        }
        if (parts->block)
            nsn_link_out_reap(peer->link, s->pool, false);
    }
    NSN_COUNT(s, deliveries_out, records);
    if (dropped)
        NSN_COUNT(s, dropped, dropped);
    return reached;
}

static void wake_plan(struct nsn_session *s)
{
    nsn_fence(); /* pairs with nsn_sleep_begin's: the sleeper sees the board, or we see its number */
    for (uint32_t g = 0; g < s->group_count; g++) {
        struct nsn_peer_out *peer = s->groups[g].peer;
        if ((!s->groups[g].drop || s->groups[g].late) && nsn_wake_due(peer->page, &peer->rung))
            nsn_out_ring(s, peer);
    }
}

/* Somebody is to read the payload where it lies. */
static bool needs_block(const struct nsn_session *s, const struct nsn_parts *parts)
{
    bool needs = false;
    for (uint32_t g = 0; nsn_parts_are_large(parts) && !parts->block && g < s->group_count && !needs; g++)
        needs = !s->groups[g].peer->copies && !s->groups[g].drop;
    return needs;
}

/* queue NULL: to everybody who is interested. Else to one member of that queue group. */
static int deliver(struct nsn_session *s, struct nsn_parts *parts, const char *queue, size_t queue_length,
                   uint32_t excluded_sid)
{
    nsn_memory_check_budget(s);
    for (;;) {
        parts->stamp = nsn_publish_enter(s);
        int result = 0;
        if (nsn_log_reader_behind(&s->log))
            result = nsn_log_reader_replay(&s->log, s->routes, s->error, sizeof s->error);
        if (result >= 0) {
            const struct nsn_route *route = nsn_routes_lookup(s->routes, parts->subject, parts->subject_length);
            if (!route)
                result = nsn_fail(s, -ENOMEM, "no memory for a subject's receivers");
            else if (queue)
                result = nsn_plan_queue(s, route, parts, queue, queue_length, excluded_sid);
            else
                result = nsn_plan_all(s, route, parts);
        }
        if (result >= 0)
            result = nsn_plan_admit(s, parts);
        if (result < 0 || !s->group_count || !needs_block(s, parts)) {
            if (result >= 0)
                result = s->group_count ? write_plan(s, parts) : 0;
            else
                s->group_count = 0;
            nsn_publish_leave(s);
            if (s->group_count)
                wake_plan(s);
            return result;
        }
        /* A large payload is written while outside: it takes long, and others wait for a publisher that is inside. */
        nsn_publish_leave(s);
        result = nsn_memory_copy_to_block(s, parts);
        if (result < 0)
            return result;
    }
}

int nsn_deliver_queue(struct nsn_session *s, const struct nsn_parts *parts, const char *queue, size_t queue_length,
                      uint32_t excluded_sid)
{
    struct nsn_parts copy = *parts;
    int result = deliver(s, &copy, queue, queue_length, excluded_sid);
    if (copy.block && copy.block != parts->block)
        nsn_block_drop(s->pool, copy.block, nsn_now_ns());
    return result;
}

static int check(struct nsn_session *s, size_t subject_length, size_t reply_length, size_t header_length, size_t payload_length)
{
    if (subject_length > NSN_SUBJECT_MAX || reply_length > NSN_SUBJECT_MAX)
        return nsn_fail(s, -EINVAL, "a subject of %zu bytes is longer than the limit of %d",
                        subject_length > reply_length ? subject_length : reply_length, NSN_SUBJECT_MAX);
    if (header_length > NSN_PAYLOAD_MAX || payload_length > NSN_PAYLOAD_MAX || header_length + payload_length > NSN_PAYLOAD_MAX)
        return nsn_fail(s, -EMSGSIZE, "a message of %zu bytes is larger than any block can be", header_length + payload_length);
    if (!s->page)
        return nsn_fail(s, -ENOTCONN, "the session is not attached yet");
    if (s->state == NSN_READY && !nsn_interest_known(s)) { /* as a server would: what was subscribed or not before counts */
        nsn_interest_flush(s);
        for (int i = 0; i < 2000 && !nsn_interest_known(s); i++)
            nsn_cpu_relax();
        if (!nsn_interest_known(s))
            return -EALREADY;
    }
    return 0;
}

static int publish(struct nsn_session *s, struct nsn_parts *parts)
{
    struct nsn_block *given = parts->block;
    bool waited = s->waiting;
    if (s->options.no_echo) {
        parts->over_slot = s->slot;
        parts->over_generation = s->generation;
        parts->flags |= NSN_RECORD_NO_ECHO;
    }
    int result = deliver(s, parts, NULL, 0, UINT32_MAX);
    if (result >= 0) {
        s->waiting = false;
        NSN_COUNT(s, messages_out, 1);
        NSN_COUNT(s, bytes_out, parts->header_length + parts->payload_length);
        if (!result)
            NSN_COUNT(s, unroutable, 1);
    } else if (result == -EAGAIN && !waited) {
        NSN_COUNT(s, waits, 1);
    }
    if (parts->block && parts->block != given)
        nsn_block_drop(s->pool, parts->block, parts->stamp);
    if (s->passing) /* a member of a queue group has ended */
        nsn_pass_on_waiting(s);
    return result;
}

int nsn_publish(struct nsn_session *s, const char *subject, size_t subject_length, const char *reply, size_t reply_length,
                const uint8_t *headers, size_t header_length, const uint8_t *payload, size_t payload_length)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    pthread_mutex_lock(&s->lock);
    int result = check(s, subject_length, reply_length, header_length, payload_length);
    if (result >= 0) {
        struct nsn_parts parts = {.subject = subject, .reply = reply, .subject_length = (uint16_t)subject_length,
                                  .reply_length = (uint16_t)reply_length, .headers = headers, .payload = payload,
                                  .header_length = (uint32_t)header_length, .payload_length = payload_length};
        result = publish(s, &parts);
    }
    pthread_mutex_unlock(&s->lock);
    return result;
}

int nsn_publish_give_up(struct nsn_session *s)
{
    pthread_mutex_lock(&s->lock);
    int count = 0;
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next) {
        if (!peer->want)
            continue;
        peer->want = false;
        nsn_link_out_unwant(peer->link);
        if (!s->waiting_pool && peer->slot != s->over_budget_slot && !nsn_memory_over_share(s, peer, peer->need.pool) &&
            nsn_need_room(peer, &peer->need) == 1)
            continue;
        nsn_out_give_up(s, peer->slot);
        count++;
    }
    s->waiting = s->waiting_pool = false;
    pthread_mutex_unlock(&s->lock);
    return count;
}

void nsn_session_count_dropped(struct nsn_session *s)
{
    pthread_mutex_lock(&s->lock);
    if (s->page)
        NSN_COUNT(s, dropped, 1);
    pthread_mutex_unlock(&s->lock);
}

static bool space_now(struct nsn_session *s)
{
    if (s->waiting_pool) {
        size_t freed = 0;
        for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
            freed += nsn_link_out_reap(peer->link, s->pool, true);
        return freed > 0;
    }
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        if (peer->want)
            nsn_link_out_reap(peer->link, s->pool, true);
    s->budget_countdown = 0;
    nsn_memory_check_budget(s);
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        if (peer->want && nsn_alive(s, peer->slot, peer->generation) &&
            (nsn_need_room(peer, &peer->need) == 0 || peer->slot == s->over_budget_slot ||
             nsn_memory_over_share(s, peer, peer->need.pool)))
            return false;
    return true;
}

int nsn_space(struct nsn_session *s)
{
    if (!s->waiting || nsn_in_child(s))
        return 0;
    pthread_mutex_lock(&s->lock);
    int space = s->waiting && space_now(s);
    if (space)
        s->waiting = s->waiting_pool = false;
    pthread_mutex_unlock(&s->lock);
    return space;
}

int nsn_publish_buffer(struct nsn_session *s, const char *subject, size_t subject_length, const char *reply,
                       size_t reply_length, struct nsn_buffer_out *buffer, uint64_t length)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    pthread_mutex_lock(&s->lock);
    struct nsn_block *block = buffer->block;
    int result = !block || length > block->capacity ? nsn_fail(s, -EINVAL, "the buffer is not this session's, or too small")
                                                    : check(s, subject_length, reply_length, 0, length);
    if (result >= 0) {
        struct nsn_parts parts = {.subject = subject, .reply = reply, .subject_length = (uint16_t)subject_length,
                                  .reply_length = (uint16_t)reply_length, .payload = block->data, .payload_length = length,
                                  .block = block};
        result = publish(s, &parts);
        if (result >= 0) {
            nsn_block_drop(s->pool, block, nsn_now_ns());
            *buffer = (struct nsn_buffer_out){0};
        }
    }
    pthread_mutex_unlock(&s->lock);
    return result;
}

int nsn_emit(struct nsn_session *s, struct nsn_emission *emission)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    pthread_mutex_lock(&s->lock);
    struct nsn_block *block = emission->buffer ? emission->buffer->block : NULL;
    int result = block && emission->length > block->capacity
                     ? nsn_fail(s, -EINVAL, "%llu bytes are more than the buffer has", (unsigned long long)emission->length)
                     : check(s, emission->subject_length, 0, 0, emission->length);
    if (result >= 0) {
        struct nsn_parts parts = {.subject = emission->subject, .reply = "",
                                  .subject_length = (uint16_t)emission->subject_length,
                                  .payload = block ? block->data : emission->payload, .payload_length = emission->length,
                                  .block = block, .unreliable = emission->unreliable};
        uint64_t dropped = s->counters.dropped;
        result = publish(s, &parts);
        emission->dropped = (uint32_t)(s->counters.dropped - dropped);
        if (result >= 0 && block) {
            nsn_block_drop(s->pool, block, nsn_now_ns());
            *emission->buffer = (struct nsn_buffer_out){0};
        }
    }
    pthread_mutex_unlock(&s->lock);
    return result;
}
