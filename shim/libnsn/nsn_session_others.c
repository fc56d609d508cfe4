/* Sessions of other users than nsnd's ("others", nsn_slots.h): their places are attached when they are first seen, and let go
 * of when nothing refers to them any more. This session itself is one of the list when it is an other.
 *
 * Between users nothing is taken on trust, time included: a stranger (of another user than this session's) that says that it
 * is inside a publish, or that a link of it is coming, is waited for only so long.
 */
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#include "nsn_place.h"
#include "nsn_session_internal.h"

static const struct nsn_page nobody; /* of a session that is gone with its place: outside of any publish, awake */

void nsn_other_hold(struct nsn_other *other)
{
    if (other)
        other->holds++;
}

void nsn_other_drop(struct nsn_other *other)
{
    if (!other || --other->holds)
        return;
    if (other->attached)
        nsn_place_detach(other->place);
    free(other);
}

static void leave_list(struct nsn_session *s, uint32_t index)
{
    struct nsn_other *other = s->others[index];
    s->others[index] = s->others[--s->other_count];
    if (s->other_at[other->slot] == other)
        s->other_at[other->slot] = NULL;
    nsn_other_drop(other);
}

/* A session that has ended stays until what it said last has been seen, or another is in its slot. */
void nsn_others_drop_ended(struct nsn_session *s)
{
    s->others_ended = 0;
    for (uint32_t i = 0; i < s->other_count;) {
        const struct nsn_other *other = s->others[i];
        uint64_t alive = nsn_load_acquire(&s->map.slots->slot[other->slot].alive);
        if (alive != other->generation && (alive || nsn_load_relaxed32(&other->place->board[s->slot]) == other->seen)) {
            leave_list(s, i);
            continue;
        }
        s->others_ended += alive != other->generation;
        i++;
    }
}

static int make_room(struct nsn_session *s)
{
    if (s->other_count < s->other_room)
        return 0;
    uint32_t room = s->other_room ? s->other_room * 2 : 8;
    struct nsn_other **others = realloc(s->others, room * sizeof *others);
    if (!others)
        return -ENOMEM;
    s->others = others;
    s->other_room = room;
    return 0;
}

/* What the slot says, if the session in it is still the same afterwards. */
static bool read_slot(const struct nsn_session *s, uint32_t slot, struct nsn_other *other)
{
    const struct nsn_slot *shared = &s->map.slots->slot[slot];
    uint64_t alive = nsn_load_acquire(&shared->alive);
    if (!alive || !nsn_load_relaxed32(&shared->other))
        return false;
    *other = (struct nsn_other){.slot = slot, .generation = (uint32_t)alive, .uid = nsn_load_relaxed32(&shared->uid),
                                .segment = (int32_t)nsn_load_relaxed32((const uint32_t *)&shared->segment), .holds = 1,
                                .identity = {nsn_load_relaxed(&shared->identity[0]), nsn_load_relaxed(&shared->identity[1])}};
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* the words above are read before this one again */
    return nsn_load_relaxed(&shared->alive) == alive;
}

static int add(struct nsn_session *s, const struct nsn_other *found, bool at_first)
{
    char error[256]; /* a session that broke off just now is no failure of this one */
    struct nsn_other *other = malloc(sizeof *other);
    if (!other || make_room(s) < 0) {
        free(other);
        return -ENOMEM;
    }
    *other = *found;
    int result = 0;
    if (other->slot == s->slot)
        other->place = s->own_place;
    else
        result = nsn_place_attach(&other->place, other->segment, other->uid, 0, error, sizeof error);
    if (result < 0) {
        free(other);
        return result == -ENOMEM ? result : 0;
    }
    other->attached = other->slot != s->slot;
    other->stranger = other->uid != s->uid;
    /* Of one that was there before this session: what it said to an earlier one in this slot. */
    other->seen = at_first ? nsn_load_acquire32(&other->place->board[s->slot]) : 0;
    s->others[s->other_count++] = other;
    s->other_at[other->slot] = other;
    return 0;
}

void nsn_others_renew(struct nsn_session *s, bool at_first)
{
    uint64_t number = nsn_load_acquire(&s->map.slots->others), highest = nsn_load_acquire(&s->map.slots->highest);
    int result = 0;
    if (number == s->others_number)
        return;
    nsn_others_drop_ended(s);
    for (uint32_t slot = 0; slot < highest && slot < NSN_SLOTS_MAX; slot++) {
        struct nsn_other found;
        if (read_slot(s, slot, &found) && !s->other_at[slot] && add(s, &found, at_first) < 0)
            result = -ENOMEM;
    }
    if (!result) /* else again at the next look */
        s->others_number = number;
}

struct nsn_other *nsn_other_find(struct nsn_session *s, uint32_t slot, uint32_t generation)
{
    nsn_others_renew(s, false);
    struct nsn_other *other = s->other_at[slot];
    return other && other->generation == generation ? other : NULL;
}

const struct nsn_page *nsn_page_of(const struct nsn_session *s, const struct nsn_other *other, uint32_t slot)
{
    if (other)
        return &other->place->page;
    return nsn_load_relaxed32(&s->map.slots->slot[slot].other) ? &nobody : &s->map.places[slot].page;
}

bool nsn_is_stranger(const struct nsn_session *s, uint32_t slot)
{
    return s->other_at[slot] && s->other_at[slot]->stranger;
}

int nsn_ring(struct nsn_session *s, const struct nsn_other *other, uint32_t slot)
{
    return other ? nsn_bell_ring_named(&s->ringer, other->identity) : nsn_bell_ring(&s->ringer, s->directory, slot);
}

void nsn_others_free(struct nsn_session *s)
{
    while (s->other_count)
        leave_list(s, 0);
    free(s->others);
    s->others = NULL;
    s->other_room = s->others_ended = 0;
    s->others_number = 0;
}

int nsn_own_place_make(struct nsn_session *s)
{
    if (s->own_place)
        return 0;
    int result = nsn_place_make(&s->own_place, &s->own_segment, s->error, sizeof s->error);
    if (result >= 0)
        result = nsn_bell_bind_named(s->identity, s->error, sizeof s->error);
    if (result < 0)
        return result;
    s->own_bell = result;
    return 0;
}

void nsn_own_place_free(struct nsn_session *s)
{
    if (s->own_place)
        nsn_place_detach(s->own_place);
    if (s->own_bell >= 0)
        close(s->own_bell);
    s->own_place = NULL;
    s->own_bell = -1;
}
