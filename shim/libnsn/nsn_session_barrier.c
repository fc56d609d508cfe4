/* Barriers: the moment after which nothing from before can still come. flush() and drain() wait for one.
 *
 * Four stages: own changes of interest are in the log and own links are with nsnd or taken; every publisher has been seen
 * outside a publish since (so whoever starts one now sees the changed interest); links announced on the board have come; the
 * links are read to where they stood then, and nothing waits for being passed on.
 */
#include <errno.h>
#include <stdlib.h>

#include "nsn_session_in.h"

enum { SETTLING, PUBLISHERS, ANNOUNCED, READING, DONE };

int nsn_barrier_start(struct nsn_session *s)
{
    struct nsn_barrier *barrier = calloc(1, sizeof *barrier);
    if (!barrier)
        return nsn_fail(s, -ENOMEM, "no memory for a barrier");
    nsn_interest_flush(s);
    s->barrier_token = s->barrier_token == INT32_MAX ? 1 : s->barrier_token + 1;
    barrier->token = s->barrier_token;
    barrier->sequence = s->sequence;
    barrier->next = s->barriers;
    s->barriers = barrier;
    return barrier->token;
}

static bool settled(struct nsn_session *s, const struct nsn_barrier *barrier)
{
    nsn_interest_known(s);
    bool handed_over = s->state == NSN_READY ? !s->outgoing : nsn_out_all_taken(s);
    return s->settled >= barrier->sequence && handed_over;
}

static struct nsn_seen *note(struct nsn_barrier *barrier, uint32_t room)
{
    free(barrier->waits);
    barrier->count = 0;
    barrier->waits = malloc((room ? room : 1) * sizeof *barrier->waits);
    return barrier->waits;
}

static uint32_t slots_in_use(const struct nsn_session *s)
{
    uint64_t highest = nsn_load_acquire(&s->map.slots->highest);
    return highest < NSN_SLOTS_MAX ? (uint32_t)highest : NSN_SLOTS_MAX;
}

/* Who is inside a publish that may have begun before the change of interest was visible. */
static bool note_publishers(struct nsn_session *s, struct nsn_barrier *barrier)
{
    uint32_t slots = slots_in_use(s);
    if (!note(barrier, slots))
        return false;
    nsn_others_renew(s, false);
    barrier->waits_since = nsn_now_ns();
    nsn_fence(); /* pairs with the fence at the start of every publish: it sees the new interest, or we see it inside */
    for (uint32_t slot = 0; slot < slots; slot++) {
        uint64_t alive = nsn_load_acquire(&s->map.slots->slot[slot].alive);
        if (!alive || slot == s->slot)
            continue;
        uint64_t inside = nsn_load_acquire(&nsn_page_of(s, s->other_at[slot], slot)->publishing);
        if (nsn_is_stranger(s, slot) && barrier->waits_since < s->other_at[slot]->not_waited_until)
            continue;
        if (inside)
            barrier->waits[barrier->count++] = (struct nsn_seen){.slot = slot, .generation = (uint32_t)alive, .number = inside};
    }
    return true;
}

/* A publisher of another user may say that it is inside for ever: it is waited for once, and then not for some time. */
static bool is_given_up(struct nsn_session *s, const struct nsn_barrier *barrier, uint32_t slot)
{
    uint64_t now = nsn_now_ns();
    if (!nsn_is_stranger(s, slot) || now - barrier->waits_since < NSN_STRANGER_INSIDE_NS)
        return false;
    s->other_at[slot]->not_waited_until = now + NSN_STRANGER_VAIN_NS;
    return true;
}

/* No publish takes this long, but for one that was stopped in the middle, or a process that has come to harm. Nobody decides
 * that it is dead: it is said whom to look at. */
static void say_who_holds_up(struct nsn_session *s, struct nsn_barrier *barrier, const struct nsn_seen *seen)
{
    if (barrier->held_up || nsn_now_ns() - barrier->waits_since < NSN_HELD_UP_NS)
        return;
    uint32_t pid = nsn_load_relaxed32(&s->map.slots->slot[seen->slot].pid);
    struct nsn_event event = {.kind = NSN_EVENT_HELD_UP, .slot = seen->slot, .number = pid};
    snprintf(event.text, sizeof event.text,
             "process %u has been in the middle of a publish for more than %llu s and holds up flush and "
             "drain here: %s", pid, NSN_HELD_UP_NS / 1000000000ull,
             nsn_process_stopped(pid) ? "it is stopped" : "if it stays so, it is damaged: end it");
    nsn_post_event(s, &event);
    NSN_COUNT(s, held_up, 1);
    barrier->held_up = true;
}

static bool publishers_left(struct nsn_session *s, struct nsn_barrier *barrier)
{
    while (barrier->count) {
        const struct nsn_seen *seen = &barrier->waits[barrier->count - 1];
        const struct nsn_page *page = nsn_page_of(s, s->other_at[seen->slot], seen->slot);
        bool alive = nsn_alive(s, seen->slot, seen->generation);
        if (alive && nsn_load_acquire(&page->publishing) == seen->number && !is_given_up(s, barrier, seen->slot)) {
            say_who_holds_up(s, barrier, seen);
            return false;
        }
        barrier->held_up = false;
        barrier->count--;
    }
    return true;
}

static bool note_tails(struct nsn_session *s, struct nsn_barrier *barrier)
{
    if (!note(barrier, s->in_count))
        return false;
    for (struct nsn_peer_in *peer = s->ins; peer; peer = peer->next) {
        uint64_t tail = nsn_link_in_tail(peer->link);
        barrier->waits[barrier->count++] = (struct nsn_seen){peer->slot, peer->generation, tail, nsn_link_in_id(peer->link)};
        if (tail != nsn_link_in_head(peer->link)) /* its producer may not have said so on the board */
            nsn_in_activate(s, peer);
    }
    return true;
}

static bool is_link(const struct nsn_peer_in *peer, const struct nsn_seen *seen)
{
    return peer->slot == seen->slot && peer->generation == seen->generation && nsn_link_in_id(peer->link) == seen->link_id;
}

static struct nsn_peer_in *peer_by(struct nsn_session *s, const struct nsn_seen *seen)
{
    struct nsn_peer_in *peer = s->in[seen->slot];
    if (peer && is_link(peer, seen))
        return peer;
    for (peer = s->ins; peer; peer = peer->next)
        if (is_link(peer, seen))
            return peer;
    return NULL;
}

/* It has waited so long for a pool segment that it may never come. */
static bool given_up(const struct nsn_peer_in *peer)
{
    return peer->blocked && peer->blocked_since && nsn_now_ns() - peer->blocked_since > NSN_BLOCKED_NS;
}

static bool tails_reached(struct nsn_session *s, struct nsn_barrier *barrier)
{
    while (barrier->count) {
        const struct nsn_seen *seen = &barrier->waits[barrier->count - 1];
        struct nsn_peer_in *peer = peer_by(s, seen);
        if (peer && nsn_link_in_head(peer->link) < seen->number && !given_up(peer))
            return false;
        barrier->count--;
    }
    return !nsn_pass_on_waiting(s);
}

static void step(struct nsn_session *s, struct nsn_barrier *barrier)
{
    if (!s->page)
        return;
    if (barrier->stage == SETTLING && settled(s, barrier) && note_publishers(s, barrier))
        barrier->stage = PUBLISHERS;
    if (barrier->stage == PUBLISHERS && publishers_left(s, barrier))
        barrier->stage = ANNOUNCED;
    if (barrier->stage == ANNOUNCED && !nsn_in_announced(s, nsn_now_ns()) && note_tails(s, barrier))
        barrier->stage = READING;
    if (barrier->stage == READING && tails_reached(s, barrier))
        barrier->stage = DONE;
}

static int finish(struct nsn_session *s, int token, bool cancel)
{
    for (struct nsn_barrier **at = &s->barriers; *at; at = &(*at)->next) {
        struct nsn_barrier *barrier = *at;
        if (barrier->token != token)
            continue;
        if (!cancel)
            step(s, barrier);
        if (!cancel && barrier->stage != DONE)
            return 0;
        *at = barrier->next;
        free(barrier->waits);
        free(barrier);
        return 1;
    }
    return -ENOENT;
}

int nsn_barrier_step(struct nsn_session *s, int token) { return finish(s, token, false); }

void nsn_barriers_free(struct nsn_session *s)
{
    while (s->barriers)
        finish(s, s->barriers->token, true);
    s->ghost_barrier = 0;
}

int nsn_barrier_begin(struct nsn_session *s)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    pthread_mutex_lock(&s->lock);
    int token = nsn_barrier_start(s);
    pthread_mutex_unlock(&s->lock);
    return token;
}

int nsn_barrier_done(struct nsn_session *s, int token)
{
    pthread_mutex_lock(&s->lock);
    nsn_out_check_taken(s);
    int result = finish(s, token, false);
    pthread_mutex_unlock(&s->lock);
    return result;
}

void nsn_barrier_cancel(struct nsn_session *s, int token)
{
    pthread_mutex_lock(&s->lock);
    finish(s, token, true);
    pthread_mutex_unlock(&s->lock);
}

int nsn_links_taken(struct nsn_session *s)
{
    pthread_mutex_lock(&s->lock);
    nsn_out_check_taken(s);
    int all = nsn_out_all_passed_on(s);
    pthread_mutex_unlock(&s->lock);
    return all;
}
