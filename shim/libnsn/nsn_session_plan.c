/* Who is to get a message (the plan), and whether all of them have room. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_session_out.h"

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

static __attribute__((noinline)) struct nsn_need need_in_parts(const struct nsn_parts *parts, uint32_t records)
{
    uint32_t each = 1 + (uint32_t)((nsn_parts_bytes(parts) + NSN_PART_BYTES - 1) / NSN_PART_BYTES);
    return (struct nsn_need){.length = NSN_PART_MAX, .parts = records * each};
}

/* For so many subscriptions of one session. */
NSN_ON_THE_WAY struct nsn_need need_of(const struct nsn_parts *parts, const struct nsn_peer_out *peer, uint32_t count)
{
    uint32_t records = (count + NSN_RECORD_SIDS - 1) / NSN_RECORD_SIDS;
    if (nsn_parts_split(parts, peer))
        return need_in_parts(parts, records);
    uint64_t pool = nsn_parts_are_large(parts) && !peer->copies ? nsn_parts_bytes(parts) : 0;
    uint32_t sids = count < NSN_RECORD_SIDS ? count : NSN_RECORD_SIDS;
    return (struct nsn_need){.length = records * nsn_parts_record_bound(parts, peer, sids), .pool = records * pool};
}

/* Has the consumer ring when there is room. 1: there is now. */
static int want_room(const struct nsn_peer_out *peer, const struct nsn_need *need)
{
    if (!need->parts)
        return nsn_link_out_want(peer->link, need->length, need->pool);
    int there = nsn_link_out_want(peer->link, need->length * need->parts, 0);
    return there < 0 ? there : nsn_need_room(peer, need);
}

enum fitness { DEAD, STALLED, FULL, FIT };

static int fitness_of(struct nsn_session *s, const struct nsn_target *member, const struct nsn_parts *parts)
{
    if (member->slot >= NSN_SLOTS_MAX || !nsn_alive(s, member->slot, member->generation))
        return DEAD;
    struct nsn_peer_out *peer = s->out[member->slot];
    if (!peer || peer->generation != member->generation)
        return nsn_out_shares_version(s, member->slot, member->generation) ? FIT : DEAD;
    if (nsn_link_out_stalled(peer->link))
        return STALLED;
    struct nsn_need need = need_of(parts, peer, NSN_RECORD_SIDS);
    bool over = member->slot == s->over_budget_slot || nsn_memory_over_share(s, peer, need.pool);
    return !over && nsn_need_room(peer, &need) == 1 ? FIT : FULL;
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

int nsn_plan_all(struct nsn_session *s, const struct nsn_route *route, const struct nsn_parts *parts)
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

int nsn_plan_queue(struct nsn_session *s, const struct nsn_route *route, const struct nsn_parts *parts, const char *queue,
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
int nsn_plan_admit(struct nsn_session *s, const struct nsn_parts *parts)
{
    int verdict = 0;
    s->group_count = 0;
    for (uint32_t first = 0, count; first < s->plan_count; first += count) {
        const struct nsn_target *target = &s->plan[first];
        for (count = 1; first + count < s->plan_count && s->plan[first + count].slot == target->slot &&
                        s->plan[first + count].generation == target->generation;)
            count++;
        struct nsn_peer_out *peer = NULL;
        int found = nsn_out_find(s, target->slot, target->generation, &peer);
        if (found < 0)
            return found;
        if (!found)
            continue;
        struct nsn_need need = need_of(parts, peer, count);
        bool stalled = nsn_link_out_stalled(peer->link);
        struct nsn_group group = {.peer = peer, .first = first, .count = count, .drop = stalled, .stalled = stalled};
        int room = group.drop ? 1 : nsn_need_room(peer, &need);
        if (room == 0 && nsn_link_out_reap(peer->link, s->pool, true)) /* for want of references */
            room = nsn_need_room(peer, &need);
        bool over = nsn_memory_over_share(s, peer, need.pool) ||
                    (peer->slot == s->over_budget_slot && nsn_link_out_behind(peer->link) > 0);
        if (room == 1 && !stalled && over)
            room = 0;
        if (room == 1 && peer->fd >= 0 && s->state != NSN_READY && nsn_link_out_behind(peer->link) > s->options.pending_size)
            return nsn_fail(s, -ENOBUFS, "nsnd is gone, and %llu bytes wait for a session that is not linked yet",
                            (unsigned long long)s->options.pending_size);
        if (room < 0) {
            nsn_out_broken(s, peer);
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
                there = nsn_need_room(peer, &need);
            }
            if (there != 1 || peer->slot == s->over_budget_slot || nsn_memory_over_share(s, peer, need.pool))
                verdict = -EAGAIN;
        }
        s->groups[s->group_count++] = group;
    }
    return verdict;
}
