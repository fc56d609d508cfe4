/* What a session may have of memory: its budget, blocks of its pool, segments that are given back. */
#include <errno.h>
#include <string.h>

#include "nsn_session_out.h"

/* At the budget the fullest link counts as full until less is in use. Looked at every so often, since it walks all links, and
 * when half of what was left at the last look has been written. */
void nsn_memory_check_budget(struct nsn_session *s)
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
bool nsn_memory_over_share(const struct nsn_session *s, const struct nsn_peer_out *peer, uint64_t bytes)
{
    uint64_t pinned = nsn_link_out_pinned(peer->link);
    return bytes && pinned && pinned + bytes > s->pool_share;
}

int nsn_memory_take_block(struct nsn_session *s, uint64_t size, struct nsn_block **block)
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
        nsn_memory_segment_gone(s, &gone[i]);
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

int nsn_memory_copy_to_block(struct nsn_session *s, struct nsn_parts *parts)
{
    int result = nsn_memory_take_block(s, parts->header_length + parts->payload_length, &parts->block);
    if (result < 0)
        return result;
    nsn_copy_to_shared(parts->block->data, parts->headers, parts->header_length);
    nsn_copy_large_to_shared(parts->block->data + parts->header_length, parts->payload, parts->payload_length);
    return 0;
}

/* Tells whoever mapped a segment that it is gone. A full link is not told: it keeps the mapping until it ends. */
void nsn_memory_segment_gone(struct nsn_session *s, const struct nsn_segment_gone *gone)
{
    uint8_t bit = (uint8_t)(1u << (gone->index % 8));
    uint32_t length = sizeof(struct nsn_record) + sizeof(struct nsn_pool_ref);
    nsn_out_forget_packets(s, -1, gone->segment);
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
        nsn_out_announce(s, peer, false);
        nsn_fence(); /* pairs with nsn_sleep_begin's */
        if (nsn_wake_due(peer->page, &peer->rung))
            nsn_out_ring(s, peer);
    }
    nsn_publish_leave(s);
}

size_t nsn_memory_trim(struct nsn_session *s)
{
    for (struct nsn_peer_out *peer = s->outs; peer; peer = peer->next)
        nsn_link_out_reap(peer->link, s->pool, true);
    struct nsn_segment_gone gone[16];
    size_t count = nsn_pool_trim(s->pool, nsn_now_ns(), gone, 16);
    for (size_t i = 0; i < count; i++)
        nsn_memory_segment_gone(s, &gone[i]);
    s->budget_countdown = 0;
    nsn_memory_check_budget(s);
    return nsn_pool_segments(s->pool);
}

int nsn_buffer_take(struct nsn_session *s, uint64_t size, struct nsn_buffer_out *buffer)
{
    if (nsn_in_child(s))
        return nsn_fail(s, -ECHILD, NSN_FORKED);
    if (size > NSN_PAYLOAD_MAX)
        return nsn_fail(s, -EMSGSIZE, "a buffer of %llu bytes is larger than any block can be", (unsigned long long)size);
    pthread_mutex_lock(&s->lock);
    struct nsn_block *block;
    int result = nsn_memory_take_block(s, size, &block);
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
