/* Publishing: who is to get a message (the plan), whether all of them have room, and then the writing.
 *
 * Nothing is written before every link of the plan has room, so a publish that has to wait can simply be made again.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nsn_session_internal.h"

#define FORKED "this connection was made before fork(): connect again in the child"
#define ALIGN8(n) (((n) + 7u) & ~7u)
#define ON_THE_WAY static inline __attribute__((always_inline)) /* of every message, from several places */

static bool alive(const struct nsn_session *s, uint32_t slot, uint32_t generation)
{
    return nsn_load_acquire(&s->map.slots->slot[slot].alive) == generation;
}

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

/* --- outgoing links ------------------------------------------------------------------------------------------------- */

static void hand_over(struct nsn_session *s, const struct nsn_peer_out *peer)
{
    struct nsn_link_packet packet = {
        .packet = {NSN_PROTOCOL_MAGIC, NSN_LINK, s->protocol},
        .peer_slot = peer->slot,
        .peer_generation = peer->generation,
        .link_id = nsn_link_out_id(peer->link),
    };
    nsn_control_send(s, &packet, sizeof packet, peer->fd);
}

static void hand_over_segment(struct nsn_session *s, const struct nsn_peer_out *peer, uint32_t segment, uint64_t size, int fd)
{
    struct nsn_segment_packet packet = {
        .packet = {NSN_PROTOCOL_MAGIC, NSN_SEGMENT, s->protocol},
        .peer_slot = peer->slot,
        .peer_generation = peer->generation,
        .segment = segment,
        .size = size,
    };
    nsn_control_send(s, &packet, sizeof packet, fd);
}

/* Queued packets name descriptors that they do not own: none stays queued when its descriptor is closed. */
static void forget_packets(struct nsn_session *s, int fd, uint32_t segment)
{
    for (struct nsn_outgoing **at = &s->outgoing; *at;) {
        struct nsn_outgoing *packet = *at;
        struct nsn_segment_packet shown = {0};
        if (packet->length == sizeof shown)
            memcpy(&shown, packet->bytes, sizeof shown);
        if (packet->fd < 0 || (packet->fd != fd && (shown.packet.type != NSN_SEGMENT || shown.segment != segment))) {
            at = &packet->next;
            continue;
        }
        *at = packet->next;
        if (s->outgoing_last == &packet->next)
            s->outgoing_last = at;
        free(packet);
    }
}

static void close_after_sending(struct nsn_session *s, int fd)
{
    forget_packets(s, fd, 0); /* no segment has number 0 */
    close(fd);
}

void nsn_out_drop(struct nsn_session *s, struct nsn_peer_out *peer)
{
    for (struct nsn_peer_out **at = &s->outs; *at; at = &(*at)->next)
        if (*at == peer) {
            *at = peer->next;
            break;
        }
    if (s->out[peer->slot] == peer)
        s->out[peer->slot] = NULL;
    if (peer->fd >= 0) {
        if (peer->slot != s->slot)
            s->untaken--;
        close_after_sending(s, peer->fd);
    }
    nsn_link_out_destroy(peer->link, s->pool);
    nsn_pass_on_forget(peer);
    nsn_other_drop(peer->other);
    free(peer);
    if (s->page)
        NSN_GAUGE(s, links_out, s->counters.links_out - 1);
}

/* Where the consumer shows itself, and where this session says that there is something for it. False when it has gone. */
static bool out_find_place(struct nsn_session *s, struct nsn_peer_out *peer)
{
    uint32_t slot = peer->slot;
    if ((nsn_load_relaxed32(&s->map.slots->slot[slot].traits) & NSN_SLOT_OTHER)) {
        peer->other = nsn_other_find(s, slot, peer->generation);
        if (!peer->other)
            return false;
        nsn_other_hold(peer->other);
    }
    peer->copies = nsn_load_relaxed32(&s->map.slots->slot[slot].uid) != s->uid;
    peer->page = nsn_page_of(s, peer->other, slot);
    peer->word = s->is_other ? &s->own_place->board[slot] : &s->map.places[slot].board[s->slot];
    return alive(s, slot, peer->generation); /* still: then all of this was about it */
}

/* 1 and *made, or 0 when the session has gone meanwhile. */
static int out_make(struct nsn_session *s, uint32_t slot, uint32_t generation, struct nsn_peer_out **made)
{
    struct nsn_peer_out *peer = calloc(1, sizeof *peer);
    if (!peer)
        return nsn_fail(s, -ENOMEM, "no memory for a link");
    *peer = (struct nsn_peer_out){.slot = slot, .generation = generation, .fd = -1};
    int result = 0;
    if (out_find_place(s, peer))
        result = nsn_link_out_create(&peer->link, ++s->link_ids, s->options.link_limit, &peer->fd, s->error, sizeof s->error);
    if (!peer->link) {
        nsn_other_drop(peer->other);
        free(peer);
        return result;
    }
    peer->next = s->outs;
    s->outs = peer;
    s->out[slot] = peer;
    NSN_GAUGE(s, links_out, s->counters.links_out + 1);
    if (slot == s->slot) {
        result = nsn_in_link(s, slot, generation, s->uid, nsn_link_out_id(peer->link), peer->fd);
        close(peer->fd);
        peer->fd = -1;
        if (result < 0) {
            nsn_out_drop(s, peer);
            return result;
        }
    } else {
        s->untaken++;
        if (s->state == NSN_READY)
            hand_over(s, peer);
    }
    *made = peer;
    return 1;
}

/* Whether that session speaks a version of the protocol that this one speaks. When not, it is said once. */
static bool shares_version(struct nsn_session *s, uint32_t slot, uint32_t generation)
{
    uint32_t traits = nsn_load_relaxed32(&s->map.slots->slot[slot].traits); /* the versions were stored before its interest */
    uint32_t lowest = nsn_slot_version_min(traits), highest = nsn_slot_version_max(traits);
    if (lowest <= NSN_PROTOCOL_VERSION && highest >= NSN_PROTOCOL_VERSION_MIN)
        return true;
    if (s->unlinked[slot] != generation) {
        s->unlinked[slot] = generation;
        struct nsn_event event = {.kind = NSN_EVENT_VERSIONS, .slot = slot, .error = -EPROTONOSUPPORT};
        snprintf(event.text, sizeof event.text, "process %u speaks versions %u to %u of the protocol and this one %d to %d: it gets "
                 "nothing from here until the older is upgraded", nsn_load_relaxed32(&s->map.slots->slot[slot].pid), lowest,
                 highest, NSN_PROTOCOL_VERSION_MIN, NSN_PROTOCOL_VERSION);
        nsn_post_event(s, &event);
    }
    return false;
}

/* The link to a session, made on first use. 1 and *found; 0 when that session lives no more, or speaks another protocol. */
static int out_find(struct nsn_session *s, uint32_t slot, uint32_t generation, struct nsn_peer_out **found)
{
    if (slot >= NSN_SLOTS_MAX)
        return 0;
    struct nsn_peer_out *peer = s->out[slot];
    if (peer && peer->generation == generation) {
        *found = peer;
        return 1;
    }
    if (!alive(s, slot, generation) || !shares_version(s, slot, generation))
        return 0;
    if (peer) { /* of an earlier session in that slot */
        nsn_pass_on_take_back(s, peer);
        nsn_out_drop(s, peer);
    }
    return out_make(s, slot, generation, found);
}

void nsn_out_check_taken(struct nsn_session *s)
{
    if (!s->untaken)
        return;
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        if (peer->fd >= 0 && nsn_link_out_taken(peer->link)) {
            close_after_sending(s, peer->fd);
            peer->fd = -1;
            s->untaken--;
        }
}

bool nsn_out_all_taken(struct nsn_session *s)
{
    nsn_out_check_taken(s);
    if (!s->untaken)
        return true;
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        if (peer->fd >= 0 && alive(s, peer->slot, peer->generation))
            return false;
    return true;
}

/* Also the pool segments: whatever nsnd has still to pass on is lost with it when this session has ended. */
bool nsn_out_all_passed_on(struct nsn_session *s)
{
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        if (!nsn_link_out_taken_with(peer->link, peer->shown) && alive(s, peer->slot, peer->generation))
            return false;
    return true;
}

/* After a reattachment: what the last nsnd may have lost on its way. Consumers know a second hand-over by its number. */
void nsn_out_resend(struct nsn_session *s)
{
    nsn_out_check_taken(s);
    if (nsn_log_reader_behind(&s->log))
        nsn_log_reader_replay(&s->log, s->routes, s->error, sizeof s->error);
    for (struct nsn_peer_out *peer = s->outs, *next; peer; peer = next) {
        next = peer->next;
        if (!alive(s, peer->slot, peer->generation)) {
            nsn_pass_on_take_back(s, peer);
            nsn_out_drop(s, peer);
        } else if (peer->fd >= 0) {
            hand_over(s, peer);
        }
    }
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        for (uint32_t place = 0; place < NSN_POOL_SEGMENTS && peer->slot != s->slot; place++) {
            uint32_t index;
            uint64_t size;
            int fd;
            if (peer->segments[place / 8] & (1u << (place % 8)) &&
                nsn_pool_segment(s->pool, s->segment_at[place], &index, &fd, &size) == 0)
                hand_over_segment(s, peer, s->segment_at[place], size, fd);
        }
}

static int show_segment(struct nsn_session *s, struct nsn_peer_out *peer, uint32_t segment)
{
    uint32_t index;
    uint64_t size;
    int fd;
    int result = nsn_pool_segment(s->pool, segment, &index, &fd, &size);
    if (result < 0)
        return result;
    uint8_t bit = (uint8_t)(1u << (index % 8));
    if (peer->segments[index / 8] & bit)
        return 0;
    if (peer->slot == s->slot)
        result = nsn_in_segment(s, s->slot, s->generation, segment, size, fd);
    else if (s->state == NSN_READY)
        hand_over_segment(s, peer, segment, size, fd);
    s->segment_at[index] = segment;
    peer->shown += result >= 0;
    if (result >= 0)
        peer->segments[index / 8] |= bit;
    return result < 0 ? result : 0;
}

static void ring(struct nsn_session *s, struct nsn_peer_out *peer)
{
    NSN_COUNT(s, bells, 1);
    peer->unrung = nsn_ring(s, peer->other, peer->slot) == -EAGAIN;
    s->unrung |= peer->unrung;
}

void nsn_out_ring_again(struct nsn_session *s)
{
    s->unrung = false;
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        if (peer->unrung)
            ring(s, peer);
}

static void out_broken(struct nsn_session *s, struct nsn_peer_out *peer)
{
    struct nsn_event event = {.kind = NSN_EVENT_LINK_BROKEN, .slot = peer->slot, .error = -EPROTO};
    snprintf(event.text, sizeof event.text, "the consumer in slot %u wrote impossible positions into its link", peer->slot);
    nsn_post_event(s, &event);
    NSN_COUNT(s, link_errors, 1);
    nsn_out_drop(s, peer);
}

/* The consumer's board says that there is something new in the link. Under way: the message is on its way to several, this
 * consumer among them, and may already have had an effect elsewhere. */
static void announce(struct nsn_session *s, const struct nsn_peer_out *peer, bool under_way)
{
    /* the generation, so that it differs from what an earlier session in this slot left behind */
    uint32_t word = (nsn_link_out_tail32(peer->link) + s->generation * 2654435761u + peer->nudges * 2654435769u) << 1 | under_way;
    nsn_store_release32(peer->word, word); /* pairs with the acquire in look() */
}

/* Has the consumer look at the link although there is nothing new in it. */
static void nudge(struct nsn_session *s, struct nsn_peer_out *peer)
{
    peer->nudges++;
    announce(s, peer, false);
}

/* --- memory --------------------------------------------------------------------------------------------------------- */

/* At the budget the fullest link counts as full until less is in use. Looked at every so often, since it walks all links, and
 * when half of what was left at the last look has been written. */
static void check_budget(struct nsn_session *s)
{
    if (s->budget_countdown && s->written < s->written_most) {
        s->budget_countdown--;
        return;
    }
    uint64_t touched = 0, most = 0;
    uint32_t fullest = UINT32_MAX;
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next) {
        touched += nsn_link_out_touched(peer->link);
        uint64_t held = nsn_link_out_behind(peer->link) + nsn_link_out_pinned(peer->link);
        if (held > most && !nsn_link_out_stalled(peer->link)) { /* of one that was given up nothing comes back by waiting */
            most = held;
            fullest = peer->slot;
        }
    }
    s->links_touched = touched;
    uint64_t pool = nsn_pool_bytes(s->pool);
    NSN_GAUGE(s, link_bytes, touched);
    NSN_GAUGE(s, pool_bytes, pool);
    bool over = touched + pool > s->options.budget && touched > 0 && most > 0;
    s->over_budget_slot = over ? fullest : UINT32_MAX;
    uint64_t left = touched + pool < s->options.budget ? s->options.budget - touched - pool : 0;
    s->written = 0;
    s->written_most = left / 2 > NSN_LINK_CHUNK ? left / 2 : NSN_LINK_CHUNK;
    s->budget_countdown = over ? 16 : 256;
}

/* What a consumer that was given up holds of the pool comes back only when it runs again. So that the others are served
 * meanwhile, nobody holds more than is left. */
static bool over_share(const struct nsn_session *s, const struct nsn_peer_out *peer, uint64_t bytes)
{
    uint64_t pinned = nsn_link_out_pinned(peer->link);
    return bytes && pinned && pinned + bytes > s->pool_share;
}

static int take_block(struct nsn_session *s, uint64_t size, struct nsn_block **block)
{
    uint64_t allowance = s->options.budget > s->links_touched ? s->options.budget - s->links_touched : 0;
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        nsn_link_out_reap(peer->link, s->pool, false);
    uint64_t held = nsn_pool_held(s->pool);
    s->pool_share = allowance > held ? allowance - held : 0;
    int result = nsn_pool_take(s->pool, size, allowance, block);
    if (result != -ENOBUFS && result != -ENFILE)
        return result < 0 ? nsn_fail(s, result, "no memory for %llu bytes of payload: %s", (unsigned long long)size,
                                     strerror(-result)) : 0;
    struct nsn_segment_gone gone[16];
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        nsn_link_out_reap(peer->link, s->pool, true);
    size_t count = nsn_pool_trim(s->pool, UINT64_MAX, gone, 16);
    for (size_t i = 0; i < count; i++)
        nsn_out_segment_gone(s, &gone[i]);
    result = nsn_pool_take(s->pool, size, allowance, block);
    if (result == -ENOBUFS || result == -ENFILE) {
        struct nsn_peer_out *fullest = NULL;
        for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
            if (nsn_link_out_pinned(peer->link) && !nsn_link_out_stalled(peer->link) &&
                (!fullest || nsn_link_out_pinned(peer->link) > nsn_link_out_pinned(fullest->link)))
                fullest = peer;
        if (!fullest)
            return nsn_fail(s, -ENOBUFS, "the session's memory budget of %llu bytes is used up: release buffers and messages, "
                            "or raise the budget", (unsigned long long)s->options.budget);
        nsn_link_out_want_memory(fullest->link);
        fullest->want = true;
        s->wait_slot = fullest->slot;
        s->waiting = s->waiting_pool = true;
        return -EAGAIN;
    }
    return result < 0 ? nsn_fail(s, result, "no memory for %llu bytes of payload: %s", (unsigned long long)size,
                                 strerror(-result)) : 0;
}

static int copy_to_block(struct nsn_session *s, struct nsn_parts *parts)
{
    int result = take_block(s, parts->header_length + parts->payload_length, &parts->block);
    if (result < 0)
        return result;
    nsn_copy_to_shared(parts->block->data, parts->headers, parts->header_length);
    nsn_copy_to_shared(parts->block->data + parts->header_length, parts->payload, parts->payload_length);
    return 0;
}

/* Tells whoever mapped a segment that it is gone. A full link is not told: it keeps the mapping until it ends. */
void nsn_out_segment_gone(struct nsn_session *s, const struct nsn_segment_gone *gone)
{
    uint8_t bit = (uint8_t)(1u << (gone->index % 8));
    uint32_t length = sizeof(struct nsn_record) + sizeof(struct nsn_pool_ref);
    forget_packets(s, -1, gone->segment);
    uint64_t stamp = nsn_publish_enter(s); /* consumers must not give memory back meanwhile */
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next) {
        if (!(peer->segments[gone->index / 8] & bit))
            continue;
        peer->segments[gone->index / 8] &= (uint8_t)~bit;
        if (nsn_link_out_stalled(peer->link) || nsn_link_out_room(peer->link, length, 0) != 1)
            continue;
        struct nsn_record record = {.length = length, .kind = NSN_RECORD_SEGMENT_GONE, .flags = NSN_RECORD_POOL,
                                    .stamp = stamp};
        struct nsn_pool_ref ref = {.segment = gone->segment};
        uint8_t *at = nsn_link_out_reserve(peer->link, length);
        nsn_copy_to_shared(at, &record, sizeof record);
        nsn_copy_to_shared(at + sizeof record, &ref, sizeof ref);
        nsn_link_out_commit(peer->link);
        announce(s, peer, false);
        nsn_fence(); /* pairs with nsn_sleep_begin's */
        if (nsn_wake_due(peer->page, &peer->rung))
            ring(s, peer);
    }
    nsn_publish_leave(s);
}

size_t nsn_out_trim(struct nsn_session *s)
{
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        nsn_link_out_reap(peer->link, s->pool, true);
    struct nsn_segment_gone gone[16];
    size_t count = nsn_pool_trim(s->pool, nsn_now_ns(), gone, 16);
    for (size_t i = 0; i < count; i++)
        nsn_out_segment_gone(s, &gone[i]);
    s->budget_countdown = 0;
    check_budget(s);
    return nsn_pool_segments(s->pool);
}

/* --- the plan --------------------------------------------------------------------------------------------------------- */

static int plan_room(struct nsn_session *s, uint32_t more)
{
    if (s->plan_count + more <= s->plan_room)
        return 0;
    uint32_t room = (s->plan_count + more) * 2 + 64;
    struct nsn_target *plan = realloc(s->plan, room * sizeof *plan);
    struct nsn_group *groups = realloc(s->groups, room * sizeof *groups);
    if (plan)
        s->plan = plan;
    if (groups)
        s->groups = groups;
    if (!plan || !groups)
        return nsn_fail(s, -ENOMEM, "no memory for the list of receivers");
    s->plan_room = room;
    return 0;
}

static uint64_t next_random(struct nsn_session *s)
{
    s->random ^= s->random << 13;
    s->random ^= s->random >> 7;
    s->random ^= s->random << 17;
    return s->random * 0x2545f4914f6cdd1dull;
}

ON_THE_WAY uint64_t bytes_of(const struct nsn_parts *parts) { return parts->header_length + parts->payload_length; }
ON_THE_WAY bool is_large(const struct nsn_parts *parts) { return parts->block || bytes_of(parts) > NSN_INLINE_MAX; }

/* Another user cannot read this session's pool: a large payload goes to it through the link, in parts. */
ON_THE_WAY bool in_parts(const struct nsn_parts *parts, const struct nsn_peer_out *peer)
{
    return peer->copies && bytes_of(parts) > NSN_INLINE_MAX;
}

/* Bytes of a record to one session, but for the payload and what stands for it. */
ON_THE_WAY uint32_t front_bytes(const struct nsn_parts *parts, uint32_t sids)
{
    return (uint32_t)(sizeof(struct nsn_record) + ALIGN8(4 * sids) + parts->subject_length + parts->reply_length);
}

/* Most bytes that a record to one session can take in its link. */
ON_THE_WAY uint32_t record_bound(const struct nsn_parts *parts, const struct nsn_peer_out *peer, uint32_t sids)
{
    bool pool = is_large(parts) && !peer->copies;
    return ALIGN8(front_bytes(parts, sids) + (pool ? (uint32_t)sizeof(struct nsn_pool_ref) : (uint32_t)bytes_of(parts)));
}

#define PART_BYTES (NSN_PART_MAX - (uint32_t)sizeof(struct nsn_record)) /* of the payload, in each */

static __attribute__((noinline)) struct nsn_need need_in_parts(const struct nsn_parts *parts, uint32_t records)
{
    uint32_t each = 1 + (uint32_t)((bytes_of(parts) + PART_BYTES - 1) / PART_BYTES);
    return (struct nsn_need){.length = NSN_PART_MAX, .parts = records * each};
}

/* For so many subscriptions of one session. */
ON_THE_WAY struct nsn_need need_of(const struct nsn_parts *parts, const struct nsn_peer_out *peer, uint32_t count)
{
    uint32_t records = (count + NSN_RECORD_SIDS - 1) / NSN_RECORD_SIDS;
    if (in_parts(parts, peer))
        return need_in_parts(parts, records);
    uint64_t pool = is_large(parts) && !peer->copies ? bytes_of(parts) : 0;
    uint32_t sids = count < NSN_RECORD_SIDS ? count : NSN_RECORD_SIDS;
    return (struct nsn_need){.length = records * record_bound(parts, peer, sids), .pool = records * pool};
}

ON_THE_WAY int room_for(const struct nsn_peer_out *peer, const struct nsn_need *need)
{
    return need->parts ? nsn_link_out_room_for(peer->link, need->length, need->parts)
                       : nsn_link_out_room(peer->link, need->length, need->pool);
}

/* Has the consumer ring when there is room. 1: there is now. */
static int want_room(const struct nsn_peer_out *peer, const struct nsn_need *need)
{
    if (!need->parts)
        return nsn_link_out_want(peer->link, need->length, need->pool);
    int there = nsn_link_out_want(peer->link, need->length * need->parts, 0);
    return there < 0 ? there : room_for(peer, need);
}

enum fitness { DEAD, STALLED, FULL, FIT };

static int fitness_of(struct nsn_session *s, const struct nsn_target *member, const struct nsn_parts *parts)
{
    if (member->slot >= NSN_SLOTS_MAX || !alive(s, member->slot, member->generation))
        return DEAD;
    struct nsn_peer_out *peer = s->out[member->slot];
    if (!peer || peer->generation != member->generation)
        return shares_version(s, member->slot, member->generation) ? FIT : DEAD;
    if (nsn_link_out_stalled(peer->link))
        return STALLED;
    struct nsn_need need = need_of(parts, peer, NSN_RECORD_SIDS);
    return room_for(peer, &need) == 1 && member->slot != s->over_budget_slot && !over_share(s, peer, need.pool) ? FIT : FULL;
}

static bool may_have(const struct nsn_session *s, const struct nsn_route_queue *queue, const struct nsn_target *member,
                     const struct nsn_parts *parts)
{
    struct nsn_receiver asked = {.slot = member->slot, .generation = member->generation, .subject = parts->subject,
                                 .queue = queue->name, .subject_length = parts->subject_length,
                                 .queue_length = queue->name_length};
    return !s->options.may_have || s->options.may_have(s->options.context, &asked);
}

static bool is_passed_over(const struct nsn_parts *parts, const struct nsn_target *member)
{
    return parts->over_generation && parts->over_generation == member->generation && parts->over_slot == member->slot;
}

/* One member at random; one that has room before one that has not, a slow one last. 1, or 0 when there is none. */
static int choose_member(struct nsn_session *s, const struct nsn_route_queue *queue, const struct nsn_parts *parts,
                         uint32_t excluded_sid, struct nsn_target *chosen)
{
    int best = DEAD;
    uint32_t start = queue->count > 1 ? (uint32_t)((next_random(s) >> 32) * queue->count >> 32) : 0;
    for (uint32_t i = 0; i < queue->count && best != FIT; i++) {
        const struct nsn_target *member = &queue->members[(start + i) % queue->count];
        if (is_passed_over(parts, member) || (member->slot == s->slot && member->sid == excluded_sid))
            continue;
        int fitness = fitness_of(s, member, parts);
        bool passed_on = parts->flags & NSN_RECORD_PASSED_ON;
        if (fitness > best && (!passed_on || may_have(s, queue, member, parts))) {
            best = fitness;
            *chosen = *member;
        }
    }
    return best != DEAD;
}

static void plan_insert(struct nsn_session *s, const struct nsn_target *target)
{
    uint32_t at = s->plan_count++;
    while (at && s->plan[at - 1].slot > target->slot) {
        s->plan[at] = s->plan[at - 1];
        at--;
    }
    s->plan[at] = *target;
}

static int plan_all(struct nsn_session *s, const struct nsn_route *route, const struct nsn_parts *parts)
{
    s->plan_count = 0;
    int result = plan_room(s, route->plain_count + route->queue_count);
    if (result < 0)
        return result;
    for (uint32_t i = 0; i < route->plain_count; i++)
        if (!s->options.no_echo || route->plain[i].slot != s->slot)
            s->plan[s->plan_count++] = route->plain[i];
    for (uint32_t i = 0; i < route->queue_count; i++) {
        struct nsn_target chosen;
        if (choose_member(s, &route->queues[i], parts, UINT32_MAX, &chosen))
            plan_insert(s, &chosen);
    }
    return 0;
}

static int plan_queue(struct nsn_session *s, const struct nsn_route *route, const struct nsn_parts *parts, const char *queue,
                      size_t queue_length, uint32_t excluded_sid)
{
    s->plan_count = 0;
    int result = plan_room(s, 1);
    for (uint32_t i = 0; result == 0 && i < route->queue_count; i++) {
        const struct nsn_route_queue *group = &route->queues[i];
        struct nsn_target chosen;
        if (group->name_length == queue_length && memcmp(group->name, queue, queue_length) == 0 &&
            choose_member(s, group, parts, excluded_sid, &chosen))
            s->plan[s->plan_count++] = chosen;
    }
    return result;
}

/* Splits the plan by session, finds or makes the links, and asks each for room. 0, or -EAGAIN with every full link asked
 * to ring. */
static int admit(struct nsn_session *s, const struct nsn_parts *parts)
{
    int verdict = 0;
    s->group_count = 0;
    for (uint32_t first = 0, count; first < s->plan_count; first += count) {
        const struct nsn_target *target = &s->plan[first];
        for (count = 1; first + count < s->plan_count && s->plan[first + count].slot == target->slot &&
                        s->plan[first + count].generation == target->generation;)
            count++;
        struct nsn_peer_out *peer = NULL;
        int found = out_find(s, target->slot, target->generation, &peer);
        if (found < 0)
            return found;
        if (!found)
            continue;
        struct nsn_need need = need_of(parts, peer, count);
        bool stalled = nsn_link_out_stalled(peer->link);
        struct nsn_group group = {.peer = peer, .first = first, .count = count, .drop = stalled, .stalled = stalled};
        int room = group.drop ? 1 : room_for(peer, &need);
        if (room == 0 && nsn_link_out_reap(peer->link, s->pool, true)) /* for want of references */
            room = room_for(peer, &need);
        bool over = over_share(s, peer, need.pool) ||
                    (peer->slot == s->over_budget_slot && nsn_link_out_behind(peer->link) > 0);
        if (room == 1 && !stalled && over)
            room = 0;
        if (room == 1 && peer->fd >= 0 && s->state != NSN_READY && nsn_link_out_behind(peer->link) > s->options.pending_size)
            return nsn_fail(s, -ENOBUFS, "nsnd is gone, and %llu bytes wait for a session that is not linked yet",
                            (unsigned long long)s->options.pending_size);
        if (room < 0) {
            out_broken(s, peer);
            continue;
        }
        if (room == 0 && (s->options.unreliable || parts->unreliable)) {
            group.drop = true;
        } else if (room == 0) {
            peer->want = true;
            s->waiting = true;
            peer->need = need;
            s->wait_slot = peer->slot;
            int there = over ? nsn_link_out_want_memory(peer->link) : want_room(peer, &need);
            if (there == 1) { /* room, or references that have been released and are still to be taken back */
                nsn_link_out_reap(peer->link, s->pool, true);
                there = room_for(peer, &need);
            }
            if (there != 1 || peer->slot == s->over_budget_slot || over_share(s, peer, need.pool))
                verdict = -EAGAIN;
        }
        s->groups[s->group_count++] = group;
    }
    return verdict;
}

/* --- writing ---------------------------------------------------------------------------------------------------------- */

ON_THE_WAY uint8_t *write_front(struct nsn_peer_out *peer, const struct nsn_parts *parts, const struct nsn_target *targets,
                                uint32_t count, uint32_t length, uint8_t flags)
{
    struct nsn_record record = {
        .length = length,
        .kind = NSN_RECORD_MESSAGE,
        .flags = (uint8_t)(parts->flags | flags),
        .sid_count = (uint16_t)count,
        .subject_length = parts->subject_length,
        .reply_length = parts->reply_length,
        .header_length = parts->header_length,
        .payload_length = parts->payload_length,
        .stamp = parts->stamp,
    };
    uint32_t sids[NSN_RECORD_SIDS];
    for (uint32_t i = 0; i < count; i++)
        sids[i] = targets[i].sid;
    uint8_t *at = nsn_link_out_reserve(peer->link, length);
    nsn_copy_to_shared(at, &record, sizeof record);
    at += sizeof record;
    nsn_copy_to_shared(at, sids, 4 * count);
    return at + ALIGN8(4 * count);
}

ON_THE_WAY uint8_t *write_names(uint8_t *at, const struct nsn_parts *parts)
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
    uint32_t length = record_bound(parts, peer, count);
    uint8_t *at = write_front(peer, parts, targets, count, length, pool ? NSN_RECORD_POOL : 0);
    s->written += length;
    if (pool) {
        struct nsn_pool_ref ref = {.segment = parts->block->segment, .offset = parts->block->offset};
        nsn_link_out_refer(peer->link, parts->block, bytes_of(parts), &ref);
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
    struct nsn_record record = {.length = ALIGN8((uint32_t)sizeof record + bytes), .kind = NSN_RECORD_PART,
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
    write_names(write_front(peer, parts, targets, count, ALIGN8(front_bytes(parts, count)), NSN_RECORD_PARTS), parts);
    nsn_link_out_append(peer->link);
    uint64_t all = bytes_of(parts);
    s->written += all;
    for (uint64_t done = 0; done < all; done += PART_BYTES)
        write_part(peer, parts, done, all - done < PART_BYTES ? (uint32_t)(all - done) : PART_BYTES);
}

/* The copies for other users come first, before anything of this publish can be seen. */
static void write_copies(struct nsn_session *s, const struct nsn_parts *parts)
{
    for (uint32_t g = 0; g < s->group_count; g++) {
        const struct nsn_group *group = &s->groups[g];
        for (uint32_t i = 0; !group->drop && in_parts(parts, group->peer) && i < group->count; i += NSN_RECORD_SIDS) {
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
        nudge(s, group->peer);
}

/* Returns for how many subscriptions. */
static int write_plan(struct nsn_session *s, const struct nsn_parts *parts)
{
    int reached = 0;
    uint64_t records = 0, dropped = 0;
    for (uint32_t g = 1; g < s->group_count; g++) /* ordered before the first record by its release store */
        if (!s->groups[g].drop)
            announce(s, s->groups[g].peer, true);
    if (is_large(parts))
        write_copies(s, parts);
    for (uint32_t g = 0; g < s->group_count; g++) {
        struct nsn_group *group = &s->groups[g];
        struct nsn_peer_out *peer = group->peer;
        reached += (int)group->count;
        if (!group->drop && parts->block && !peer->copies && show_segment(s, peer, parts->block->segment) < 0) {
            group->drop = true;
            announce(s, peer, false);
        }
        if (group->drop) {
            dropped += group->count;
            if (group->stalled)
                drop_for_stalled(s, group);
            continue;
        }
        bool written = in_parts(parts, peer);
        if (written) {
            nsn_link_out_reveal(peer->link);
            records += (group->count + NSN_RECORD_SIDS - 1) / NSN_RECORD_SIDS;
        }
        for (uint32_t i = 0; !written && i < group->count; i += NSN_RECORD_SIDS) {
            uint32_t left = group->count - i;
            write_record(s, peer, parts, &s->plan[group->first + i], left < NSN_RECORD_SIDS ? left : NSN_RECORD_SIDS);
            records++;
        }
        announce(s, peer, false);
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
            ring(s, peer);
    }
}

/* Somebody is to read the payload where it lies. */
static bool needs_block(const struct nsn_session *s, const struct nsn_parts *parts)
{
    bool needs = false;
    for (uint32_t g = 0; is_large(parts) && !parts->block && g < s->group_count && !needs; g++)
        needs = !s->groups[g].peer->copies && !s->groups[g].drop;
    return needs;
}

/* queue NULL: to everybody who is interested. Else to one member of that queue group. */
static int deliver(struct nsn_session *s, struct nsn_parts *parts, const char *queue, size_t queue_length, uint32_t excluded_sid)
{
    check_budget(s);
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
                result = plan_queue(s, route, parts, queue, queue_length, excluded_sid);
            else
                result = plan_all(s, route, parts);
        }
        if (result >= 0)
            result = admit(s, parts);
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
        result = copy_to_block(s, parts);
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
        return nsn_fail(s, -ECHILD, FORKED);
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

static void give_up(struct nsn_session *s, struct nsn_peer_out *peer)
{
    nsn_link_out_stall(peer->link);
    nudge(s, peer); /* it may have read everything just now, and would never look at the mark */
    nsn_fence();    /* pairs with nsn_sleep_begin's */
    if (nsn_wake_due(peer->page, &peer->rung))
        ring(s, peer);
    struct nsn_event event = {.kind = NSN_EVENT_GAVE_UP, .slot = peer->slot, .number = nsn_link_out_behind(peer->link)};
    snprintf(event.text, sizeof event.text, "the subscriber in slot %u did not read for the whole write deadline: its "
             "messages are dropped until it does", peer->slot);
    nsn_post_event(s, &event);
}

void nsn_out_give_up(struct nsn_session *s, uint32_t slot)
{
    struct nsn_peer_out *peer = slot < NSN_SLOTS_MAX ? s->out[slot] : NULL;
    if (peer)
        give_up(s, peer);
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
        if (!s->waiting_pool && peer->slot != s->over_budget_slot && !over_share(s, peer, peer->need.pool) &&
            room_for(peer, &peer->need) == 1)
            continue;
        give_up(s, peer);
        count++;
    }
    s->waiting = s->waiting_pool = false;
    pthread_mutex_unlock(&s->lock);
    return count;
}

void nsn_publish_count_dropped(struct nsn_session *s)
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
    check_budget(s);
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        if (peer->want && alive(s, peer->slot, peer->generation) &&
            (room_for(peer, &peer->need) == 0 || peer->slot == s->over_budget_slot || over_share(s, peer, peer->need.pool)))
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

void nsn_out_peer_gone(struct nsn_session *s, uint32_t slot, uint32_t generation)
{
    struct nsn_peer_out *peer = slot < NSN_SLOTS_MAX ? s->out[slot] : NULL;
    if (!peer || peer->generation != generation)
        return;
    if (nsn_log_reader_behind(&s->log)) /* takes its queue messages back before its interest is forgotten */
        nsn_log_reader_replay(&s->log, s->routes, s->error, sizeof s->error);
    nsn_pass_on_take_back(s, peer); /* also when the last of its interest had gone before */
    nsn_out_drop(s, peer);
    nsn_pass_on_waiting(s);
}

/* --- buffers ---------------------------------------------------------------------------------------------------------- */

int nsn_buffer_take(struct nsn_session *s, uint64_t size, struct nsn_buffer_out *buffer)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, FORKED);
    if (size > NSN_PAYLOAD_MAX)
        return nsn_fail(s, -EMSGSIZE, "a buffer of %llu bytes is larger than any block can be", (unsigned long long)size);
    pthread_mutex_lock(&s->lock);
    struct nsn_block *block;
    int result = take_block(s, size, &block);
    if (result >= 0)
        *buffer = (struct nsn_buffer_out){.block = block, .data = block->data, .capacity = block->capacity};
    pthread_mutex_unlock(&s->lock);
    return result;
}

void nsn_buffer_drop(struct nsn_session *s, struct nsn_buffer_out *buffer)
{
    if (nsn_in_child(s))
        return;
    pthread_mutex_lock(&s->lock);
    if (buffer->block)
        nsn_block_drop(s->pool, buffer->block, nsn_now_ns());
    *buffer = (struct nsn_buffer_out){0};
    pthread_mutex_unlock(&s->lock);
}

int nsn_publish_buffer(struct nsn_session *s, const char *subject, size_t subject_length, const char *reply, size_t reply_length,
                       struct nsn_buffer_out *buffer, uint64_t length)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, FORKED);
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
        return nsn_fail(s, -ECHILD, FORKED);
    pthread_mutex_lock(&s->lock);
    struct nsn_block *block = emission->buffer ? emission->buffer->block : NULL;
    int result = block && emission->length > block->capacity
                     ? nsn_fail(s, -EINVAL, "%llu bytes are more than the buffer has", (unsigned long long)emission->length)
                     : check(s, emission->subject_length, 0, 0, emission->length);
    if (result >= 0) {
        struct nsn_parts parts = {.subject = emission->subject, .reply = "", .subject_length = (uint16_t)emission->subject_length,
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
