/* Outgoing links: made on first use, handed over through nsnd, told to their consumers' boards, and dropped. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nsn_session_out.h"

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
void nsn_out_forget_packets(struct nsn_session *s, int fd, uint32_t segment)
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
    nsn_out_forget_packets(s, fd, 0); /* no segment has number 0 */
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
    return nsn_alive(s, slot, peer->generation); /* still: then all of this was about it */
}

/* 1 and *made, or 0 when the session has gone meanwhile. */
static __attribute__((cold, noinline)) int out_make(struct nsn_session *s, uint32_t slot, uint32_t generation,
                                                    struct nsn_peer_out **made)
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
bool nsn_out_shares_version(struct nsn_session *s, uint32_t slot, uint32_t generation)
{
    uint32_t traits = nsn_load_relaxed32(&s->map.slots->slot[slot].traits); /* the versions were stored before its interest */
    uint32_t lowest = nsn_slot_version_min(traits), highest = nsn_slot_version_max(traits);
    if (lowest <= NSN_PROTOCOL_VERSION && highest >= NSN_PROTOCOL_VERSION_MIN)
        return true;
    if (s->unlinked[slot] != generation) {
        s->unlinked[slot] = generation;
        struct nsn_event event = {.kind = NSN_EVENT_VERSIONS, .slot = slot, .error = -EPROTONOSUPPORT};
        snprintf(event.text, sizeof event.text, "process %u speaks versions %u to %u of the protocol and this one %d to %d: "
                 "it gets nothing from here until the older is upgraded", nsn_load_relaxed32(&s->map.slots->slot[slot].pid),
                 lowest, highest, NSN_PROTOCOL_VERSION_MIN, NSN_PROTOCOL_VERSION);
        nsn_post_event(s, &event);
    }
    return false;
}

/* The link to a session, made on first use. 1 and *found; 0 when that session lives no more, or speaks another protocol. */
int nsn_out_find(struct nsn_session *s, uint32_t slot, uint32_t generation, struct nsn_peer_out **found)
{
    if (slot >= NSN_SLOTS_MAX)
        return 0;
    struct nsn_peer_out *peer = s->out[slot];
    if (peer && peer->generation == generation) {
        *found = peer;
        return 1;
    }
    if (!nsn_alive(s, slot, generation) || !nsn_out_shares_version(s, slot, generation))
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
        if (peer->fd >= 0 && nsn_alive(s, peer->slot, peer->generation))
            return false;
    return true;
}

/* Also the pool segments: whatever nsnd has still to pass on is lost with it when this session has ended. */
bool nsn_out_all_passed_on(struct nsn_session *s)
{
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        if (!nsn_link_out_taken_with(peer->link, peer->shown) && nsn_alive(s, peer->slot, peer->generation))
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
        if (!nsn_alive(s, peer->slot, peer->generation)) {
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

int nsn_out_show_segment(struct nsn_session *s, struct nsn_peer_out *peer, uint32_t segment)
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

void nsn_out_ring(struct nsn_session *s, struct nsn_peer_out *peer)
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
            nsn_out_ring(s, peer);
}

void nsn_out_broken(struct nsn_session *s, struct nsn_peer_out *peer)
{
    struct nsn_event event = {.kind = NSN_EVENT_LINK_BROKEN, .slot = peer->slot, .error = -EPROTO};
    snprintf(event.text, sizeof event.text, "the consumer in slot %u wrote impossible positions into its link", peer->slot);
    nsn_post_event(s, &event);
    NSN_COUNT(s, link_errors, 1);
    nsn_out_drop(s, peer);
}

static void give_up(struct nsn_session *s, struct nsn_peer_out *peer)
{
    nsn_link_out_stall(peer->link);
    nsn_out_nudge(s, peer); /* it may have read everything just now, and would never look at the mark */
    nsn_fence();            /* pairs with nsn_sleep_begin's */
    if (nsn_wake_due(peer->page, &peer->rung))
        nsn_out_ring(s, peer);
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
