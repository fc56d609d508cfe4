/* Receiving: which links have something, in which order their records go to the subscriptions, and what becomes of records
 * that no subscription takes.
 *
 * Order: the clock is read, then the board, then the links' heads. A publisher that writes to several links says on the board
 * of each, before it writes to the first, that a message is under way; nothing later than that publish is dispatched until
 * it has come. What is left goes out by stamp, up to the clock as it was read. So a message never comes before one that caused
 * it: whatever an earlier stamp caused was announced before. A publisher that stands still is waited for only so long.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "nsn_session_internal.h"

#define NOT_IN_HEAP UINT64_MAX
#define QUIET_LOOKS 32u /* at the board, in a spin, between whole rounds */
#define LOOKS_MOST 64 /* at a board word that changes each time */
#define BLOB_LEAST (64u << 10)

/* --- incoming links ---------------------------------------------------------------------------------------------------- */

static void activate(struct nsn_session *s, struct nsn_peer_in *peer)
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

void nsn_in_activate(struct nsn_session *s, struct nsn_peer_in *peer) { activate(s, peer); }

static void deactivate(struct nsn_session *s, struct nsn_peer_in *peer)
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

static void in_drop(struct nsn_session *s, struct nsn_peer_in *peer)
{
    deactivate(s, peer);
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
        in_drop(s, s->ins);
}

static void in_broken(struct nsn_session *s, struct nsn_peer_in *peer, const char *what)
{
    struct nsn_event event = {.kind = NSN_EVENT_LINK_BROKEN, .slot = peer->slot, .error = -EPROTO};
    snprintf(event.text, sizeof event.text, "the publisher in slot %u broke its link (%s): the link was dropped", peer->slot, what);
    nsn_post_event(s, &event);
    NSN_COUNT(s, link_errors, 1);
    if (s->in[peer->slot] == peer)
        s->in_vain[peer->slot] = peer->generation;
    if (peer->other)
        peer->other->in_vain = true;
    in_drop(s, peer);
}

/* Another link takes the place of one that its producer has given up, which is a fault already. Many of them, not read to
 * their ends, would fill the address space. */
static int map_link(struct nsn_session *s, struct nsn_peer_in *peer, uint64_t link_id, int fd)
{
    uint32_t unread = 0;
    for (const struct nsn_peer_in *other = s->ins; other && s->in[peer->slot]; other = other->next)
        unread += other->slot == peer->slot && other->generation == peer->generation;
    if (unread >= NSN_LINKS_UNREAD)
        return nsn_fail(s, -EPROTO, "the publisher in slot %u hands over link after link: %u of them are not read to their ends",
                        peer->slot, unread);
    return nsn_link_in_map(&peer->link, fd, link_id, s->error, sizeof s->error);
}

/* A link from an other that lives is of use only while its board can be seen. */
static int in_find_place(struct nsn_session *s, struct nsn_peer_in *peer, uint32_t uid)
{
    peer->stranger = uid != s->uid;
    if (uid != s->node_uid) {
        peer->other = nsn_other_find(s, peer->slot, peer->generation);
        if (!peer->other && nsn_load_acquire(&s->map.slots->slot[peer->slot].alive) == peer->generation)
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
        activate(s, peer);
    } else if (peer) {
        peer->gone = true;
        activate(s, peer);
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
    activate(s, peer);
    return 0;
}

static struct nsn_segment_in **segment_place(struct nsn_peer_in *peer, uint32_t segment)
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
    if (!peer || peer->generation != generation || segment_place(peer, segment))
        return 0;
    if (peer->stranger) {
        in_broken(s, peer, "it hands over memory of another user's");
        return nsn_fail(s, -EPROTO, "slot %u hands over a pool segment, and is another user's", slot);
    }
    if (peer->segment_count >= 4 * NSN_POOL_SEGMENTS) {
        in_broken(s, peer, "it hands over more pool segments than there can be");
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
        in_broken(s, peer, "a pool segment is not what it should be");
    if (result < 0)
        return result;
    peer->segment_count++;
    nsn_link_in_took_segment(peer->link);
    peer->blocked = false;
    activate(s, peer);
    return 0;
}

static void segment_gone(struct nsn_peer_in *peer, uint32_t segment)
{
    struct nsn_segment_in **place = segment_place(peer, segment);
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
            activate(s, peer);
        }
}

/* After a reattachment: the last nsnd may not have said who has ended. */
void nsn_in_check_alive(struct nsn_session *s)
{
    for (struct nsn_peer_in *peer = s->ins; peer; peer = peer->next)
        if (nsn_load_acquire(&s->map.slots->slot[peer->slot].alive) != peer->generation) {
            peer->gone = true;
            peer->blocked = false;
            activate(s, peer);
        }
}

/* --- what is there ------------------------------------------------------------------------------------------------------- */

static uint32_t slots_in_use(const struct nsn_session *s)
{
    uint64_t highest = nsn_load_acquire(&s->map.slots->highest);
    return highest < NSN_SLOTS_MAX ? (uint32_t)highest : NSN_SLOTS_MAX;
}

/* Whether a process is stopped, or gone; the kernel knows. Who cannot be asked, in another PID namespace, is taken to be. */
bool nsn_process_stopped(uint32_t pid)
{
    char name[32], text[256];
    snprintf(name, sizeof name, "/proc/%u/stat", pid);
    int fd = open(name, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    text[length > 0 ? length : 0] = 0;
    const char *state = strrchr(text, ')'); /* "pid (name) state …" */
    return !state || strchr("TtZXx", state[1] ? state[2] : 'T');
}

/* A publisher that is long inside one publish waits for a processor, or was stopped there (or says that it is inside, and is
 * not). Asked now and then. */
static bool stands_still(struct nsn_session *s, struct nsn_peer_in *peer, uint64_t inside, uint64_t now)
{
    if (peer->hold_stamp == inside && now - peer->hold_asked < NSN_HOLD_NS / 4)
        return peer->hold_stopped;
    peer->hold_stamp = inside;
    peer->hold_asked = now;
    peer->hold_stopped = nsn_process_stopped(nsn_load_relaxed32(&s->map.slots->slot[peer->slot].pid));
    return peer->hold_stopped;
}

/* Another user's publisher may say that it is inside for ever: that holds for a while, and then not for some time. */
static bool may_hold(struct nsn_peer_in *peer, uint64_t now)
{
    if (!peer->held_since || now - peer->held_since > NSN_STRANGER_REST_NS)
        peer->held_since = now;
    return now - peer->held_since < NSN_STRANGER_HOLD_NS;
}

/* A message is under way from a publisher that has a link to this session. True while it is to be waited for. */
static bool under_way(struct nsn_session *s, struct nsn_peer_in *peer, uint64_t now)
{
    uint64_t inside = nsn_load_acquire(&peer->page->publishing);
    if (peer->stranger && !inside)
        peer->held_since = 0;
    else if (peer->stranger && !may_hold(peer, now))
        return false;
    if (!inside || nsn_load_acquire(&s->map.slots->slot[peer->slot].alive) != peer->generation)
        return false; /* it has just been written, or never will be */
    uint64_t age = inside < now ? now - inside : 0;
    if (age >= NSN_HOLD_NS && (age >= NSN_HOLD_MOST_NS || stands_still(s, peer, inside, now)))
        return false;
    if (inside < s->latest)
        s->latest = inside;
    return true;
}

static bool is_in_vain(const struct nsn_session *s, const struct nsn_other *other, uint32_t slot, uint64_t now)
{
    if (!other)
        return nsn_load_relaxed(&s->map.slots->slot[slot].generation) == s->in_vain[slot];
    bool impatient = s->strangers_vain_since && now - s->strangers_vain_since < NSN_STRANGER_VAIN_NS;
    return other->in_vain || (other->stranger && impatient);
}

/* One publisher's word has changed: activates its link. True when its link is announced, and not here yet. */
static inline __attribute__((always_inline)) bool look_at(struct nsn_session *s, const struct nsn_other *other, uint32_t slot,
                                                          const uint32_t *said, uint32_t *seen, uint64_t now)
{
    uint32_t word = nsn_load_acquire32(said); /* pairs with announce(): behind the link's tail */
    struct nsn_peer_in *peer = s->in[slot];
    if (peer)
        nsn_link_in_prefetch(peer->link);
    uint64_t lives = peer ? nsn_load_acquire(&s->map.slots->slot[slot].alive) : 0;
    if (peer && (!lives || lives == peer->generation)) {
        activate(s, peer);
        bool waited_for = false;
        uint32_t last = 0;
        for (int looks = 0; word & 1 && word != last && !waited_for && looks < LOOKS_MOST; looks++) {
            waited_for = under_way(s, peer, now);
            last = word;
            word = nsn_load_acquire32(said); /* the publish was over: final, or the next one's */
        }
        if (!waited_for)
            *seen = word;
        return false;
    }
    if (peer) /* also of a session that has ended: its link may still be on its way */
        activate(s, peer);
    if (!is_in_vain(s, other, slot, now))
        return true;
    *seen = word;
    return false;
}

static __attribute__((noinline)) bool look_at_others(struct nsn_session *s, uint64_t now, bool *by_strangers)
{
    bool announced = false;
    for (uint32_t i = 0; i < s->other_count; i++) {
        struct nsn_other *other = s->others[i];
        const uint32_t *said = &other->place->board[s->slot];
        if (nsn_load_relaxed32(said) == other->seen || !look_at(s, other, other->slot, said, &other->seen, now))
            continue;
        announced |= !other->stranger;
        *by_strangers |= other->stranger;
    }
    return announced;
}

/* Looks over the board: activates the links that have changed, notes what is under way. now: a reading of the clock. */
static void look(struct nsn_session *s, uint64_t now)
{
    uint32_t slots = slots_in_use(s);
    bool announced = false, by_strangers = false;
    s->latest = now;
    for (uint32_t slot = 0; slot < slots; slot++)
        if (nsn_load_relaxed32(&s->board[slot]) != s->board_seen[slot])
            announced |= look_at(s, NULL, slot, &s->board[slot], &s->board_seen[slot], now);
    if (nsn_load_acquire(&s->map.slots->others) != s->others_number) /* pairs with others_changed in nsn_slots.c */
        nsn_others_renew(s, false);
    if (s->other_count)
        announced |= look_at_others(s, now, &by_strangers);
    if (s->others_ended)
        nsn_others_drop_ended(s);
    s->announced_by_strangers = by_strangers && !announced;
    if (!announced && !by_strangers)
        s->announced_since = 0;
    else if (!s->announced_since)
        s->announced_since = now;
}

/* Announced links are not waited for any more. */
static void give_announced_up(struct nsn_session *s, uint64_t now)
{
    uint32_t slots = slots_in_use(s);
    for (uint32_t slot = 0; slot < slots; slot++)
        if (!s->in[slot] || nsn_load_acquire(&s->map.slots->slot[slot].alive) != s->in[slot]->generation) {
            uint32_t word = nsn_load_acquire32(&s->board[slot]);
            if (word != s->board_seen[slot])
                s->in_vain[slot] = nsn_load_relaxed(&s->map.slots->slot[slot].generation);
            s->board_seen[slot] = word;
        }
    for (uint32_t i = 0; i < s->other_count; i++) {
        struct nsn_other *other = s->others[i];
        uint32_t word = nsn_load_acquire32(&other->place->board[s->slot]);
        if (word == other->seen || (s->in[other->slot] && s->in[other->slot]->generation == other->generation))
            continue;
        other->in_vain = true;
        other->seen = word;
        if (other->stranger)
            s->strangers_vain_since = now;
    }
    s->announced_since = 0;
}

/* True while a link is announced on the board that nsnd has not brought yet, unless it has been so for too long. */
bool nsn_in_announced(struct nsn_session *s, uint64_t now)
{
    look(s, now);
    if (!s->announced_since)
        return false;
    if (s->state == NSN_READY) /* else there may be a welcome, which is not for here: everything may start over with it */
        nsn_control_receive(s);
    look(s, now);
    if (!s->announced_since)
        return false;
    uint64_t waited = now - s->announced_since;
    bool patient = waited < NSN_HANDOVER_MOST_NS && !s->announced_by_strangers && !nsn_process_stopped(s->node_pid);
    if (s->control >= 0 && (waited < NSN_HANDOVER_NS || patient))
        return true;
    give_announced_up(s, now);
    return false;
}

bool nsn_in_pending(struct nsn_session *s)
{
    look(s, nsn_now_ns());
    for (uint32_t i = 0; i < s->active_count; i++)
        if (!s->active[i]->blocked)
            return true;
    return false;
}

/* --- large messages ---------------------------------------------------------------------------------------------------------- */

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

static void ring_if_wanted(struct nsn_session *s, struct nsn_peer_in *peer)
{
    if (nsn_link_in_publish(peer->link)) {
        NSN_COUNT(s, bells, 1);
        nsn_ring(s, peer->other, peer->slot);
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
            ring_if_wanted(s, entry->peer);
        }
        if (entry->segment)
            nsn_segment_in_drop(entry->segment);
        free(entry->copy);
        *entry = (struct nsn_large){.next_free = s->large_free};
        s->large_free = large;
    }
    pthread_mutex_unlock(&s->lock);
}

/* --- one record ---------------------------------------------------------------------------------------------------------------- */

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
    struct nsn_segment_in **place = segment_place(peer, view->pool_ref.segment);
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
static bool may_take(const struct nsn_session *s, const struct nsn_subscription *subscription, const char *subject, size_t length)
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

/* Each time would be another copy of the message. */
static bool named_before(const struct nsn_record_view *view, uint32_t at)
{
    for (uint32_t i = 0; i < at; i++)
        if (view->sids[i] == view->sids[at])
            return true;
    return false;
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
static inline __attribute__((always_inline)) uint32_t to_blob(struct batch *batch, const struct nsn_record_view *view, bool large)
{
    const struct nsn_record *record = &view->record;
    uint32_t offset = (uint32_t)batch->used;
    uint8_t *at = batch->blob + batch->used;
    memcpy(at, view->subject, record->subject_length);
    at += record->subject_length;
    memcpy(at, view->reply, record->reply_length);
    at += record->reply_length;
    if (!large) {
        memcpy(at, view->headers, record->header_length);
        at += record->header_length;
        memcpy(at, view->payload, record->payload_length);
        at += record->payload_length;
    }
    batch->used = (size_t)(at - batch->blob);
    return offset;
}

/* Another user's publisher may name any subscription; it gets to those only what they are for. */
static bool is_for(const struct nsn_subscription *subscription, const char *subject, size_t length)
{
    return nsn_subject_routable(subject, length) &&
           nsn_pattern_matches(subscription->names, subscription->pattern_length, subject, length);
}

/* Sets *handle to a new large message, or leaves it when there is no memory for that. */
static __attribute__((noinline)) void lend(struct nsn_session *s, struct nsn_peer_in *peer, const struct nsn_record_view *view, struct nsn_segment_in *segment,
                 const uint8_t *inside, uint8_t **copy, uint32_t *handle)
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
        segment_gone(peer, view->pool_ref.segment);
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
        if (passes && named_before(view, i)) {
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
            lend(s, peer, view, segment, inside, &copy, &handle);
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
            segment_gone(peer, view.pool_ref.segment);
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
            ring_if_wanted(s, peer);
        passed_on = s->counters.passed_on;
    }
    if (result < 0) {
        in_broken(s, peer, "its records are impossible");
        return;
    }
    ring_if_wanted(s, peer); /* the position first: the publisher looks for room as soon as it sees the answer */
    nsn_link_in_acknowledge_stall(peer->link, &dropped);
    NSN_COUNT(s, discarded, messages + dropped);
    NSN_COUNT(s, slow_consumer, 1);
    struct nsn_event event = {.kind = NSN_EVENT_SLOW_CONSUMER, .slot = peer->slot, .number = messages + dropped};
    snprintf(event.text, sizeof event.text, "slow consumer: %llu messages of the publisher in slot %u were dropped",
             (unsigned long long)(messages + dropped), peer->slot);
    nsn_post_event(s, &event);
    ring_if_wanted(s, peer);
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

/* --- order ------------------------------------------------------------------------------------------------------------------------ */

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
            in_broken(s, peer, "its positions are impossible");
            continue;
        }
        if (there && stamp > now + NSN_HOLD_NS && stamp > nsn_now_ns() + NSN_HOLD_NS) { /* it would be held back for ever */
            in_broken(s, peer, "its messages are stamped in the future; has its time namespace another clock?");
            continue;
        }
        if (there == 0) {
            if (peer->gone && nsn_link_in_empty(peer->link))
                in_drop(s, peer);
            else
                deactivate(s, peer);
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
        ring_if_wanted(s, touched[i]);
}

static void merge(struct nsn_session *s, struct batch *batch, uint64_t latest)
{
    struct nsn_record_view view;
    struct nsn_peer_in *touched[64];
    uint32_t touched_count = 0, heap = s->active_count;
    while (heap && batch->count < batch->most && batch->bytes < NSN_BATCH_BYTES && s->passing_bytes < NSN_PASSING_BYTES) {
        struct nsn_peer_in *peer = s->active[0];
        if (s->active_stamp[0] > latest) {
            s->held = true;
            break;
        }
        int result = peer->blocked ? 0 : nsn_link_in_peek(peer->link, &view, UINT64_MAX);
        bool blocked = peer->blocked;
        uint64_t passed_on = s->counters.passed_on;
        if (result == 1) {
            result = take_record(s, peer, &view, batch);
            blocked = peer->blocked;
        }
        if (result < 0) {
            settle(s, touched, touched_count);
            in_broken(s, peer, "its records are impossible");
            return;
        }
        if (result == 0 && blocked) {
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
        peer->blocked_since = 0;
        nsn_link_in_consume(peer->link);
        if (s->counters.passed_on != passed_on) /* at once: who dies in between has passed one on twice, not many */
            ring_if_wanted(s, peer);
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

static int receive_once(struct nsn_session *s, struct batch *batch)
{
    s->held = false;
    if (nsn_pass_on_waiting(s) && s->passing_bytes >= NSN_PASSING_BYTES)
        return 0;
    uint64_t now = nsn_now_ns();
    look(s, now);
    if (s->announced_since && nsn_in_announced(s, now)) {
        s->held = true;
        return 0;
    }
    if (!s->active_count)
        return 0;
    uint64_t latest = s->latest; /* also with one link: what caused its records may be in one that is not here yet */
    gather(s, now);
    if (s->active_count)
        merge(s, batch, latest);
    if (batch->count) {
        nsn_store_relaxed(&s->page->counters.messages_in, s->counters.messages_in);
        nsn_store_relaxed(&s->page->counters.bytes_in, s->counters.bytes_in);
    }
    return batch->count;
}

/* True when the spin should end: something for the caller that is not a message. */
static bool attention(struct nsn_session *s) { return s->event_count || (s->waiting && s->outs); }

/* Between rounds, without the lock and the clock: nobody has written to the board. */
static bool is_quiet(const struct nsn_session *s)
{
    uint32_t slots = slots_in_use(s);
    for (uint32_t slot = 0; slot < slots; slot++)
        if (nsn_load_relaxed32(&s->board[slot]) != s->board_seen[slot])
            return false;
    for (uint32_t i = 0; i < s->other_count; i++)
        if (nsn_load_relaxed32(&s->others[i]->place->board[s->slot]) != s->others[i]->seen)
            return false;
    return true;
}

int nsn_receive(struct nsn_session *s, struct nsn_message *messages, int most, uint8_t *blob, size_t blob_size, uint64_t spin_ns)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, "this connection was made before fork(): connect again in the child");
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
        for (uint32_t i = 0; i < (held ? 1 : QUIET_LOOKS) && is_quiet(s); i++)
            nsn_cpu_relax();
    }
}

int nsn_receive_held(struct nsn_session *s) { return s->held || s->passing; }
