/* What the files of a session's sending side share: links (nsn_session_out.c), memory (nsn_session_memory.c), the plan
 * (nsn_session_plan.c), and writing (nsn_session_publish.c). */
#ifndef NSN_SESSION_OUT_H
#define NSN_SESSION_OUT_H

#include "nsn_session_internal.h"

#define NSN_ALIGN8(n) (((n) + 7u) & ~7u)
#define NSN_ALIGN_LINE(n) (((n) + NSN_CACHE_LINE - 1u) & ~(NSN_CACHE_LINE - 1u))
#define NSN_ON_THE_WAY static inline __attribute__((always_inline)) /* of every message, from several places */
#define NSN_PART_BYTES (NSN_PART_MAX - (uint32_t)sizeof(struct nsn_record)) /* of the payload, in each */

/* --- how long records are ---------------------------------------------------------------------------------------- */

NSN_ON_THE_WAY uint64_t nsn_parts_bytes(const struct nsn_parts *parts) { return parts->header_length + parts->payload_length; }

NSN_ON_THE_WAY bool nsn_parts_are_large(const struct nsn_parts *parts)
{
    return parts->block || nsn_parts_bytes(parts) > NSN_INLINE_MAX;
}

/* Another user cannot read this session's pool: a large payload goes to it through the link, in parts. */
NSN_ON_THE_WAY bool nsn_parts_split(const struct nsn_parts *parts, const struct nsn_peer_out *peer)
{
    return peer->copies && nsn_parts_bytes(parts) > NSN_INLINE_MAX;
}

/* Bytes of a record to one session, but for the payload and what stands for it. */
NSN_ON_THE_WAY uint32_t nsn_parts_front_bytes(const struct nsn_parts *parts, uint32_t sids)
{
    return (uint32_t)(sizeof(struct nsn_record) + NSN_ALIGN8(4 * sids) + parts->subject_length + parts->reply_length);
}

/* Most bytes that a record to one session can take in its link. Whole cache lines: while the consumer reads one record, the
 * producer writes the next into lines of its own. */
NSN_ON_THE_WAY uint32_t nsn_parts_record_bound(const struct nsn_parts *parts, const struct nsn_peer_out *peer, uint32_t sids)
{
    bool pool = nsn_parts_are_large(parts) && !peer->copies;
    uint32_t behind = pool ? (uint32_t)sizeof(struct nsn_pool_ref) : (uint32_t)nsn_parts_bytes(parts);
    return NSN_ALIGN_LINE(nsn_parts_front_bytes(parts, sids) + behind);
}

NSN_ON_THE_WAY int nsn_need_room(const struct nsn_peer_out *peer, const struct nsn_need *need)
{
    return need->parts ? nsn_link_out_room_for(peer->link, need->length, need->parts)
                       : nsn_link_out_room(peer->link, need->length, need->pool);
}

/* --- links ------------------------------------------------------------------------------------------------------- */

/* The consumer's board says that there is something new in the link. Under way: the message is on its way to several, this
 * consumer among them, and may already have had an effect elsewhere. */
static inline void nsn_out_announce(struct nsn_session *s, const struct nsn_peer_out *peer, bool under_way)
{
    /* the generation, so that it differs from what an earlier session in this slot left behind */
    uint32_t number = nsn_link_out_tail32(peer->link) + s->generation * 2654435761u + peer->nudges * 2654435769u;
    uint32_t word = number << 1 | under_way;
    nsn_store_release32(peer->word, word); /* pairs with the acquire in look_at(), nsn_session_look.c */
}

/* Has the consumer look at the link although there is nothing new in it. */
static inline void nsn_out_nudge(struct nsn_session *s, struct nsn_peer_out *peer)
{
    peer->nudges++;
    nsn_out_announce(s, peer, false);
}

/* The link to a session, made on first use. 1 and *found; 0 when that session lives no more, or speaks another protocol. */
int nsn_out_find(struct nsn_session *s, uint32_t slot, uint32_t generation, struct nsn_peer_out **found);
/* Whether that session speaks a version of the protocol that this one speaks. When not, it is said once. */
bool nsn_out_shares_version(struct nsn_session *s, uint32_t slot, uint32_t generation);
/* Nothing is written to that session's link until it has answered. */
void nsn_out_give_up(struct nsn_session *s, uint32_t slot);
void nsn_out_ring(struct nsn_session *s, struct nsn_peer_out *peer);
/* What its consumer wrote is impossible: the link is dropped. */
void nsn_out_broken(struct nsn_session *s, struct nsn_peer_out *peer);
/* The consumer is to have the pool segment before a record that refers to it. 0, or a negative errno. */
int nsn_out_show_segment(struct nsn_session *s, struct nsn_peer_out *peer, uint32_t segment);
/* Queued packets name descriptors that they do not own: none stays queued when its descriptor is closed. */
void nsn_out_forget_packets(struct nsn_session *s, int fd, uint32_t segment);

/* --- memory ------------------------------------------------------------------------------------------------------ */

/* At the budget the fullest link counts as full until less is in use. */
void nsn_memory_check_budget(struct nsn_session *s);
/* Whether the peer would hold more of the pool than is left for the others. */
bool nsn_memory_over_share(const struct nsn_session *s, const struct nsn_peer_out *peer, uint64_t bytes);
/* 0; -EAGAIN: when readers have released something; or a negative errno with words. */
int nsn_memory_take_block(struct nsn_session *s, uint64_t size, struct nsn_block **block);
/* The same, with the message's headers and payload in it. */
int nsn_memory_copy_to_block(struct nsn_session *s, struct nsn_parts *parts);

/* --- the plan ---------------------------------------------------------------------------------------------------- */

/* Everybody who is interested; one member of each queue group. 0, or a negative errno. */
int nsn_plan_all(struct nsn_session *s, const struct nsn_route *route, const struct nsn_parts *parts);
/* One member of that queue group, and not this session's subscription excluded_sid. */
int nsn_plan_queue(struct nsn_session *s, const struct nsn_route *route, const struct nsn_parts *parts, const char *queue,
                   size_t queue_length, uint32_t excluded_sid);
/* Splits the plan by session, finds or makes the links, and asks each for room. 0, or -EAGAIN with every full link asked
 * to ring. */
int nsn_plan_admit(struct nsn_session *s, const struct nsn_parts *parts);

#endif
