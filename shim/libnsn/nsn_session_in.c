/* Incoming links: mapped when nsnd brings them, listed while they may have something, dropped when they are read to their ends;
 * and the large messages in them, which a program reads where they lie. */
#include <errno.h>
#include <stdlib.h>

#include "nsn_session_in.h"

void nsn_in_activate(struct nsn_session *s, struct nsn_peer_in *peer)
{
    if (peer->active)
        return;
    if (s->active_count == s->active_room) {
        uint32_t room = s->active_room ? s->active_room * 2 : 16;
        struct nsn_peer_in **active = realloc(s->active, room * sizeof *active);
        if (active)
            s->active = active;
        uint64_t *stamps = realloc(s->active_stamp, room * sizeof *stamps);
        if (stamps)
            s->active_stamp = stamps;
        if (!active || !stamps)
            return; /* stays on the board as seen; the next record announces it again */
        s->active_room = room;
    }
    peer->active = true;
    s->active[s->active_count++] = peer;
}

void nsn_in_deactivate(struct nsn_session *s, struct nsn_peer_in *peer)
{
    if (!peer->active)
        return;
    for (uint32_t i = 0; i < s->active_count; i++)
        if (s->active[i] == peer) {
            s->active[i] = s->active[--s->active_count];
            break;
        }
    peer->active = false;
}

void nsn_in_drop(struct nsn_session *s, struct nsn_peer_in *peer)
{
    nsn_in_deactivate(s, peer);
    for (struct nsn_peer_in **at = &s->ins; *at; at = &(*at)->next)
        if (*at == peer) {
            *at = peer->next;
            break;
        }
    if (s->in[peer->slot] == peer)
        s->in[peer->slot] = NULL;
    s->in_count--;
    for (uint32_t i = 0; i < s->large_room && peer->larges; i++)
        if (s->larges[i].peer == peer) {
            s->larges[i].peer = NULL; /* its segment is still held: the bytes stay readable until released */
            peer->larges--;
        }
    for (uint32_t i = 0; i < peer->segment_count; i++)
        nsn_segment_in_drop(peer->segments[i]);
    free(peer->segments);
    nsn_link_in_destroy(peer->link);
    nsn_other_drop(peer->other);
    free(peer);
    if (s->page)
        NSN_GAUGE(s, links_in, s->in_count);
}

void nsn_in_drop_all(struct nsn_session *s)
{
    while (s->ins)
        nsn_in_drop(s, s->ins);
}

void nsn_in_broken(struct nsn_session *s, struct nsn_peer_in *peer, const char *what)
{
    struct nsn_event event = {.kind = NSN_EVENT_LINK_BROKEN, .slot = peer->slot, .error = -EPROTO};
    snprintf(event.text, sizeof event.text, "the publisher in slot %u broke its link (%s): the link was dropped",
             peer->slot, what);
    nsn_post_event(s, &event);
    NSN_COUNT(s, link_errors, 1);
    if (s->in[peer->slot] == peer)
        s->in_vain[peer->slot] = peer->generation;
    if (peer->other)
        peer->other->in_vain = true;
    nsn_in_drop(s, peer);
}

/* Another link takes the place of one that its producer has given up, which is a fault already. Many of them, not read to
 * their ends, would fill the address space. */
static int map_link(struct nsn_session *s, struct nsn_peer_in *peer, uint64_t link_id, int fd)
{
    uint32_t unread = 0;
    for (const struct nsn_peer_in *other = s->ins; other && s->in[peer->slot]; other = other->next)
        unread += other->slot == peer->slot && other->generation == peer->generation;
    if (unread >= NSN_LINKS_UNREAD)
        return nsn_fail(s, -EPROTO, "the publisher in slot %u hands over link after link: %u of them are not read to "
                        "their ends", peer->slot, unread);
    return nsn_link_in_map(&peer->link, fd, link_id, s->error, sizeof s->error);
}

/* A link from an other that lives is of use only while its board can be seen. */
static int in_find_place(struct nsn_session *s, struct nsn_peer_in *peer, uint32_t uid)
{
    peer->stranger = uid != s->uid;
    if (uid != s->node_uid) {
        peer->other = nsn_other_find(s, peer->slot, peer->generation);
        if (!peer->other && nsn_alive(s, peer->slot, peer->generation))
            return nsn_fail(s, s->others_number == nsn_load_relaxed(&s->map.slots->others) ? -EPROTO : -ENOMEM,
                            "the place of the publisher in slot %u cannot be attached", peer->slot);
        nsn_other_hold(peer->other);
    }
    peer->page = nsn_page_of(s, peer->other, peer->slot);
    return 0;
}

int nsn_in_link(struct nsn_session *s, uint32_t slot, uint32_t generation, uint32_t uid, uint64_t link_id, int fd)
{
    if (fd < 0)
        return -EMFILE;
    if (slot >= NSN_SLOTS_MAX)
        return nsn_fail(s, -EPROTO, "a link came from slot %u, and there is no such slot", slot);
    struct nsn_peer_in *peer = s->in[slot];
    if (peer && peer->generation == generation) {
        if (nsn_link_in_id(peer->link) == link_id)
            return 0; /* handed over again after nsnd was replaced */
        peer->gone = true;
        nsn_in_activate(s, peer);
    } else if (peer) {
        peer->gone = true;
        nsn_in_activate(s, peer);
    }
    peer = calloc(1, sizeof *peer);
    if (!peer)
        return nsn_fail(s, -ENOMEM, "no memory for a link");
    peer->slot = slot;
    peer->generation = generation;
    int result = in_find_place(s, peer, uid);
    if (result == 0)
        result = map_link(s, peer, link_id, fd);
    if (result < 0) {
        struct nsn_event event = {.kind = NSN_EVENT_LINK_BROKEN, .slot = slot, .error = result};
        snprintf(event.text, sizeof event.text, "%.150s", s->error);
        nsn_post_event(s, &event);
        NSN_COUNT(s, link_errors, 1);
        nsn_other_drop(peer->other);
        free(peer);
        return result;
    }
    peer->next = s->ins;
    s->ins = peer;
    s->in[slot] = peer;
    s->in_count++;
    NSN_GAUGE(s, links_in, s->in_count);
    if (peer->other) /* to be looked at: a message may be under way */
        peer->other->seen = nsn_load_acquire32(&peer->other->place->board[s->slot]) ^ 1u << 31;
    else
        s->board_seen[slot] = nsn_load_acquire32(&s->board[slot]) ^ 1u << 31;
    nsn_in_activate(s, peer);
    return 0;
}

struct nsn_segment_in **nsn_in_segment_place(struct nsn_peer_in *peer, uint32_t segment)
{
    for (uint32_t i = peer->segment_count; i-- > 0;)
        if (peer->segments[i]->segment == segment)
            return &peer->segments[i];
    return NULL;
}

int nsn_in_segment(struct nsn_session *s, uint32_t slot, uint32_t generation, uint32_t segment, uint64_t size, int fd)
{
    struct nsn_peer_in *peer = slot < NSN_SLOTS_MAX ? s->in[slot] : NULL;
    if (fd < 0)
        return -EMFILE;
    if (!peer || peer->generation != generation || nsn_in_segment_place(peer, segment))
        return 0;
    if (peer->stranger) {
        nsn_in_broken(s, peer, "it hands over memory of another user's");
        return nsn_fail(s, -EPROTO, "slot %u hands over a pool segment, and is another user's", slot);
    }
    if (peer->segment_count >= 4 * NSN_POOL_SEGMENTS) {
        nsn_in_broken(s, peer, "it hands over more pool segments than there can be");
        return nsn_fail(s, -EPROTO, "slot %u hands over more pool segments than there can be", slot);
    }
    if (peer->segment_count == peer->segment_room) {
        uint32_t room = peer->segment_room ? peer->segment_room * 2 : 8;
        struct nsn_segment_in **segments = realloc(peer->segments, room * sizeof *segments);
        if (!segments)
            return nsn_fail(s, -ENOMEM, "no memory for a pool segment");
        peer->segments = segments;
        peer->segment_room = room;
    }
    int result = nsn_segment_in_map(&peer->segments[peer->segment_count], fd, segment, size, s->error, sizeof s->error);
    if (result == -EPROTO)
        nsn_in_broken(s, peer, "a pool segment is not what it should be");
    if (result < 0)
        return result;
    peer->segment_count++;
    nsn_link_in_took_segment(peer->link);
    peer->blocked = false;
    nsn_in_activate(s, peer);
    return 0;
}

void nsn_in_segment_gone(struct nsn_peer_in *peer, uint32_t segment)
{
    struct nsn_segment_in **place = nsn_in_segment_place(peer, segment);
    if (!place)
        return;
    nsn_segment_in_drop(*place);
    *place = peer->segments[--peer->segment_count];
}

void nsn_in_peer_gone(struct nsn_session *s, uint32_t slot, uint32_t generation)
{
    for (struct nsn_peer_in *peer = s->ins; peer; peer = peer->next)
        if (peer->slot == slot && peer->generation == generation) {
            peer->gone = true;
            peer->blocked = false;
            nsn_in_activate(s, peer);
        }
}

/* After a reattachment: the last nsnd may not have said who has ended. */
void nsn_in_check_alive(struct nsn_session *s)
{
    for (struct nsn_peer_in *peer = s->ins; peer; peer = peer->next)
        if (!nsn_alive(s, peer->slot, peer->generation)) {
            peer->gone = true;
            peer->blocked = false;
            nsn_in_activate(s, peer);
        }
}

void nsn_in_show_progress(struct nsn_session *s, struct nsn_peer_in *peer)
{
    if (nsn_link_in_publish(peer->link)) {
        NSN_COUNT(s, bells, 1);
        nsn_ring(s, peer->other, peer->slot);
    }
}

/* --- large messages ---------------------------------------------------------------------------------------------- */

static uint32_t large_take(struct nsn_session *s)
{
    if (s->large_free == UINT32_MAX) {
        uint32_t room = s->large_room ? s->large_room * 2 : 64;
        struct nsn_large *larges = realloc(s->larges, room * sizeof *larges);
        if (!larges)
            return UINT32_MAX;
        s->larges = larges;
        for (uint32_t i = s->large_room; i < room; i++)
            larges[i] = (struct nsn_large){.next_free = i + 1 < room ? i + 1 : UINT32_MAX};
        s->large_free = s->large_room;
        s->large_room = room;
    }
    uint32_t index = s->large_free;
    s->large_free = s->larges[index].next_free;
    return index;
}

void nsn_in_lend(struct nsn_session *s, struct nsn_peer_in *peer, const struct nsn_record_view *view,
                 struct nsn_segment_in *segment, const uint8_t *inside, uint8_t **copy, uint32_t *handle)
{
    *handle = large_take(s);
    if (*handle == UINT32_MAX) {
        NSN_COUNT(s, discarded, 1);
    } else if (*copy) {
        s->larges[*handle] = (struct nsn_large){.data = *copy, .copy = *copy};
        *copy = NULL;
    } else {
        nsn_segment_in_hold(segment);
        s->larges[*handle] = (struct nsn_large){.peer = peer, .segment = segment, .data = inside, .ref = view->pool_ref.ref,
                                                .use = view->pool_ref.use};
        peer->larges++;
    }
}

const uint8_t *nsn_large(struct nsn_session *s, uint32_t large)
{
    if (nsn_in_child(s))
        return NULL;
    pthread_mutex_lock(&s->lock);
    const uint8_t *data = large < s->large_room && s->larges[large].holds ? s->larges[large].data : NULL;
    pthread_mutex_unlock(&s->lock);
    return data;
}

void nsn_large_release(struct nsn_session *s, uint32_t large)
{
    if (nsn_in_child(s))
        return;
    pthread_mutex_lock(&s->lock);
    struct nsn_large *entry = large < s->large_room ? &s->larges[large] : NULL;
    if (entry && entry->holds && --entry->holds == 0) {
        if (entry->peer) {
            entry->peer->larges--;
            nsn_link_in_release(entry->peer->link, entry->ref, entry->use);
            nsn_in_show_progress(s, entry->peer);
        }
        if (entry->segment)
            nsn_segment_in_drop(entry->segment);
        free(entry->copy);
        *entry = (struct nsn_large){.next_free = s->large_free};
        s->large_free = large;
    }
    pthread_mutex_unlock(&s->lock);
}
