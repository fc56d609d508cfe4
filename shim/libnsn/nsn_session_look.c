/* What is there for a session: whose links have something new, and which messages are under way to it. */
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "nsn_session_in.h"

#define LOOKS_MOST 64 /* at a board word that changes each time */
#define FEW_WORDS 32u /* looking at more of them twice takes longer than reading the clock */

static uint32_t slots_in_use(const struct nsn_session *s)
{
    uint64_t highest = nsn_load_acquire(&s->map.slots->highest);
    return highest < NSN_SLOTS_MAX ? (uint32_t)highest : NSN_SLOTS_MAX;
}

/* The first slot from `slot` on whose word has changed; `end` when there is none. */
static inline uint32_t next_changed(const struct nsn_session *s, uint32_t slot, uint32_t end)
{
    while (slot < end && nsn_load_relaxed32(&s->board[slot]) == s->board_seen[slot])
        slot++;
    return slot;
}

static inline bool others_words_are_quiet(const struct nsn_session *s)
{
    for (uint32_t i = 0; i < s->other_count; i++)
        if (nsn_load_relaxed32(&s->others[i]->place->board[s->slot]) != s->others[i]->seen)
            return false;
    return true;
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
    if (!inside || !nsn_alive(s, peer->slot, peer->generation))
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
        nsn_in_activate(s, peer);
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
        nsn_in_activate(s, peer);
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
void nsn_look(struct nsn_session *s, uint64_t now)
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

/* --- without the clock -------------------------------------------------------------------------------------------- */

static bool others_are_quiet(const struct nsn_session *s)
{
    /* pairs with others_changed in nsn_slots.c */
    return others_words_are_quiet(s) && nsn_load_acquire(&s->map.slots->others) == s->others_number;
}

/* The publisher's word has changed: activates its link, unless there is more to it than a message in that link. */
static bool activate_plainly(struct nsn_session *s, struct nsn_peer_in *peer)
{
    uint32_t word = nsn_load_acquire32(&s->board[peer->slot]); /* pairs with nsn_out_announce(): behind the link's tail */
    nsn_link_in_prefetch(peer->link);
    uint64_t lives = nsn_load_acquire(&s->map.slots->slot[peer->slot].alive);
    if (word & 1 || (lives && lives != peer->generation))
        return false;
    nsn_in_activate(s, peer);
    s->board_seen[peer->slot] = word;
    return s->active_count == 1;
}

/* Mostly there is nothing, or one link has something and all other words are as they were. Those are looked at again behind the
 * link's tail: what the records before it follow from, in whatever link to here, was announced before them, and would be seen.
 * So they may go out without a limit from the clock. */
enum nsn_sight nsn_look_for_one(struct nsn_session *s, struct nsn_peer_in **one, uint64_t *end)
{
    uint32_t slots = slots_in_use(s);
    if (slots + s->other_count > FEW_WORDS || s->active_count > 1 || s->announced_since || s->others_ended)
        return NSN_SIGHT_UNCLEAR;
    uint32_t slot = next_changed(s, 0, slots);
    if (slot == slots && !s->active_count)
        return others_are_quiet(s) ? NSN_SIGHT_NOTHING : NSN_SIGHT_UNCLEAR;
    struct nsn_peer_in *peer = slot < slots ? s->in[slot] : s->active[0];
    if (!peer || peer->gone || peer->blocked || peer->other || (slot < slots && !activate_plainly(s, peer)))
        return NSN_SIGHT_UNCLEAR;
    if (nsn_link_in_stalled(peer->link) || nsn_link_in_end(peer->link, end) < 0)
        return NSN_SIGHT_UNCLEAR;
    slots = slots_in_use(s); /* as what follows: behind the acquire load of the tail */
    if (next_changed(s, 0, peer->slot) < peer->slot || next_changed(s, peer->slot + 1, slots) < slots || !others_are_quiet(s))
        return NSN_SIGHT_UNCLEAR;
    *one = peer;
    return NSN_SIGHT_ONE;
}

/* --- what is announced, and not there ----------------------------------------------------------------------------- */

/* Announced links are not waited for any more. */
static void give_announced_up(struct nsn_session *s, uint64_t now)
{
    uint32_t slots = slots_in_use(s);
    for (uint32_t slot = 0; slot < slots; slot++)
        if (!s->in[slot] || !nsn_alive(s, slot, s->in[slot]->generation)) {
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
    nsn_look(s, now);
    if (!s->announced_since)
        return false;
    if (s->state == NSN_READY) /* else there may be a welcome, which is not for here: everything may start over with it */
        nsn_control_receive(s);
    nsn_look(s, now);
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
    nsn_look(s, nsn_now_ns());
    for (uint32_t i = 0; i < s->active_count; i++)
        if (!s->active[i]->blocked)
            return true;
    return false;
}

/* Between rounds, without the lock and the clock: nobody has written to the board. */
bool nsn_is_quiet(const struct nsn_session *s)
{
    uint32_t slots = slots_in_use(s);
    return next_changed(s, 0, slots) == slots && others_words_are_quiet(s);
}
