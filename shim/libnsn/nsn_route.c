/* Subject -> subscriptions: a tree of tokens, and in front of it a bounded cache of resolved subjects.
 *
 * A pattern's last token is a node; its subscriptions hang there in groups, one for plain ones and one a queue name. What a
 * node holds is laid out once as a route (its view) and shared by all cached subjects that match that node alone. Such a
 * cached pointer stays good because a change of a node first drops every cached subject that its pattern matches.
 */
#include "nsn_route.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_counted.h"
#include "nsn_route_cache.h"
#include "nsn_shared.h"
#include "nsn_subject.h"
#include "nsn_targets.h"

#define CACHE_ENTRIES_DEFAULT 4096
#define TOKENS_MAX (NSN_SUBJECT_MAX / 2 + 1)
#define CLEAR_INSTEAD 512 /* changes at once that make forgetting the whole cache cheaper than a search of it for each */

enum kind { LITERAL, STAR, TAIL };

struct block { /* a route with its arrays behind it, in one piece */
    struct nsn_route route;
    struct nsn_route_queue queues[];
};

struct node {
    struct nsn_item item; /* of a literal token, in `nodes` by parent and token */
    struct node *parent, *star, *tail;
    struct group *groups;
    struct block *view; /* what hangs here; built when a lookup wants it, dropped by a change */
    size_t view_size;
    uint32_t literal_children;
    uint16_t length;
    uint8_t kind;
    char token[];
};

struct queue_name { /* one for all groups of that name, so that equal names are equal pointers */
    struct nsn_item item;
    uint32_t groups;
    uint32_t index; /* the rest: while routes are merged */
    uint32_t members;
    uint64_t merge;
    uint16_t length;
    char bytes[];
};

struct group { /* the subscriptions of one pattern and one queue name */
    struct nsn_item item;
    struct node *node;
    struct queue_name *queue; /* NULL: plain */
    struct group *previous, *next;
    struct subscription *first, *last;
    uint32_t count;
};

struct subscription {
    struct nsn_targets_entry entry;
    struct group *group;
    struct subscription *previous, *next;
};

struct token {
    uint32_t start, length;
    uint64_t hash; /* 0: not wanted so far */
};

struct step { /* of a walk: tokens before `depth` have led to node */
    struct node *node;
    uint32_t depth;
};

struct nsn_routes {
    nsn_routes_parting parting;
    void *parting_context;
    struct node *root;
    struct nsn_table nodes, groups, queue_names;
    struct nsn_targets targets;
    struct nsn_cache cache;
    uint64_t seed;
    uint64_t merges;
    size_t bytes;
    struct node **matched;
    size_t matched_count, matched_capacity;
    struct block *scratch; /* a merged route that is not cached */
    size_t scratch_size;
    struct nsn_target *sorting;
    size_t sorting_capacity;
    uint32_t token_count;
    struct token tokens[TOKENS_MAX];
    struct step steps[TOKENS_MAX + 2]; /* each step adds at most one more than it takes */
    char pattern[NSN_SUBJECT_MAX];
};

static const struct nsn_route nobody;

/* --- tree --------------------------------------------------------------------------------------------------------- */

static uint64_t node_hash(const struct node *parent, uint64_t token_hash)
{
    return nsn_mix(token_hash ^ (uintptr_t)parent, 0x8ebc6af09c88c6e3ull);
}

static struct node *find_literal(const struct nsn_routes *routes, const struct node *parent, const char *token, size_t length,
                                 uint64_t token_hash)
{
    struct nsn_item *item = nsn_table_first(&routes->nodes, node_hash(parent, token_hash));
    for (; item; item = nsn_table_next(item)) {
        struct node *node = nsn_container_of(item, struct node, item);
        if (node->parent == parent && node->length == length && memcmp(node->token, token, length) == 0)
            return node;
    }
    return NULL;
}

static struct node *new_node(struct nsn_routes *routes, struct node *parent, enum kind kind, const char *token, size_t length)
{
    struct node *node = nsn_take(&routes->bytes, sizeof(*node) + length);
    if (!node)
        return NULL;
    node->parent = parent;
    node->kind = (uint8_t)kind;
    node->length = (uint16_t)length;
    memcpy(node->token, token, length);
    return node;
}

static struct node *child_for(struct nsn_routes *routes, struct node *parent, const char *token, size_t length, bool last)
{
    struct node **special = length != 1 ? NULL : *token == '*' ? &parent->star : *token == '>' && last ? &parent->tail : NULL;
    if (special) {
        if (!*special)
            *special = new_node(routes, parent, *token == '*' ? STAR : TAIL, token, length);
        return *special;
    }
    uint64_t hash = nsn_hash(token, length, routes->seed);
    struct node *node = find_literal(routes, parent, token, length, hash);
    if (node)
        return node;
    node = new_node(routes, parent, LITERAL, token, length);
    if (node) {
        nsn_table_insert(&routes->nodes, &node->item, node_hash(parent, hash));
        parent->literal_children++;
    }
    return node;
}

/* Frees a node that carries nothing, and those above it that then carry nothing. */
static void prune(struct nsn_routes *routes, struct node *node)
{
    while (node->parent && !node->groups && !node->literal_children && !node->star && !node->tail) {
        struct node *parent = node->parent;
        if (node->kind == STAR)
            parent->star = NULL;
        else if (node->kind == TAIL)
            parent->tail = NULL;
        else {
            nsn_table_remove(&routes->nodes, &node->item);
            parent->literal_children--;
        }
        nsn_give(&routes->bytes, node->view, node->view_size);
        nsn_give(&routes->bytes, node, sizeof(*node) + node->length);
        node = parent;
    }
}

static struct node *node_for(struct nsn_routes *routes, const char *pattern, size_t length)
{
    struct node *node = routes->root;
    for (size_t start = 0, end; start <= length; start = end + 1) {
        const char *dot = memchr(pattern + start, '.', length - start);
        end = dot ? (size_t)(dot - pattern) : length;
        struct node *child = child_for(routes, node, pattern + start, end - start, end == length);
        if (!child) {
            prune(routes, node);
            return NULL;
        }
        node = child;
    }
    return node;
}

/* The node's pattern, in routes->pattern. */
static size_t pattern_of(struct nsn_routes *routes, const struct node *node, const char **pattern)
{
    char *end = routes->pattern + sizeof(routes->pattern), *start = end;
    for (; node->parent; node = node->parent) {
        if (start != end)
            *--start = '.';
        start -= node->length;
        memcpy(start, node->token, node->length);
    }
    *pattern = start;
    return (size_t)(end - start);
}

/* A change is about to be made, or has just been made, below this node. */
static void changed(struct nsn_routes *routes, struct node *node, const char *pattern, size_t length)
{
    nsn_cache_drop(&routes->cache, pattern, length, routes->seed);
    nsn_give(&routes->bytes, node->view, node->view_size);
    node->view = NULL;
    node->view_size = 0;
}

/* --- groups ------------------------------------------------------------------------------------------------------- */

static struct queue_name *queue_name_for(struct nsn_routes *routes, const char *name, size_t length)
{
    uint64_t hash = nsn_hash(name, length, routes->seed);
    for (struct nsn_item *item = nsn_table_first(&routes->queue_names, hash); item; item = nsn_table_next(item)) {
        struct queue_name *queue = nsn_container_of(item, struct queue_name, item);
        if (queue->length == length && memcmp(queue->bytes, name, length) == 0)
            return queue;
    }
    struct queue_name *queue = nsn_take(&routes->bytes, sizeof(*queue) + length);
    if (!queue)
        return NULL;
    queue->length = (uint16_t)length;
    memcpy(queue->bytes, name, length);
    nsn_table_insert(&routes->queue_names, &queue->item, hash);
    return queue;
}

static void queue_name_release(struct nsn_routes *routes, struct queue_name *queue)
{
    if (!queue || queue->groups)
        return;
    nsn_table_remove(&routes->queue_names, &queue->item);
    nsn_give(&routes->bytes, queue, sizeof(*queue) + queue->length);
}

static uint64_t group_hash(const struct node *node, const struct queue_name *queue)
{
    return nsn_mix((uintptr_t)node ^ 0x1d8e4e27c47d124full, (uintptr_t)queue ^ 0xeb44accab455d165ull);
}

static struct group *new_group(struct nsn_routes *routes, struct node *node, struct queue_name *queue)
{
    struct group *group = nsn_take(&routes->bytes, sizeof(*group));
    if (!group)
        return NULL;
    group->node = node;
    group->queue = queue;
    group->next = node->groups;
    if (group->next)
        group->next->previous = group;
    node->groups = group;
    if (queue)
        queue->groups++;
    nsn_table_insert(&routes->groups, &group->item, group_hash(node, queue));
    return group;
}

static struct group *group_for(struct nsn_routes *routes, struct node *node, const char *name, size_t length)
{
    struct queue_name *queue = NULL;
    if (length && !(queue = queue_name_for(routes, name, length)))
        return NULL;
    struct nsn_item *item = nsn_table_first(&routes->groups, group_hash(node, queue));
    for (; item; item = nsn_table_next(item)) {
        struct group *group = nsn_container_of(item, struct group, item);
        if (group->node == node && group->queue == queue)
            return group;
    }
    struct group *group = new_group(routes, node, queue);
    if (!group)
        queue_name_release(routes, queue);
    return group;
}

static void group_release(struct nsn_routes *routes, struct group *group)
{
    if (group->first)
        return;
    if (group->next)
        group->next->previous = group->previous;
    if (group->previous)
        group->previous->next = group->next;
    else
        group->node->groups = group->next;
    nsn_table_remove(&routes->groups, &group->item);
    if (group->queue) {
        group->queue->groups--;
        queue_name_release(routes, group->queue);
    }
    nsn_give(&routes->bytes, group, sizeof(*group));
}

static void group_append(struct group *group, struct subscription *subscription)
{
    subscription->group = group;
    subscription->previous = group->last;
    subscription->next = NULL;
    if (group->last)
        group->last->next = subscription;
    else
        group->first = subscription;
    group->last = subscription;
    group->count++;
}

static void group_remove(struct group *group, struct subscription *subscription)
{
    if (subscription->previous)
        subscription->previous->next = subscription->next;
    else
        group->first = subscription->next;
    if (subscription->next)
        subscription->next->previous = subscription->previous;
    else
        group->last = subscription->previous;
    group->count--;
}

/* --- building routes ---------------------------------------------------------------------------------------------- */

static inline bool target_after(const struct nsn_target *a, const struct nsn_target *b)
{
    if (a->slot != b->slot)
        return a->slot > b->slot;
    return a->sid != b->sid ? a->sid > b->sid : a->generation > b->generation;
}

static size_t run_length(const struct nsn_target *targets, size_t count)
{
    size_t length = 1;
    while (length < count && !target_after(&targets[length - 1], &targets[length]))
        length++;
    return length;
}

/* Merges neighbouring sorted runs of source, pair by pair, into destination; returns how many runs it wrote. */
static size_t merge_runs(const struct nsn_target *source, struct nsn_target *destination, size_t count)
{
    size_t runs = 0;
    for (size_t start = 0, end; start < count; start = end, runs++) {
        size_t middle = start + run_length(source + start, count - start);
        end = middle < count ? middle + run_length(source + middle, count - middle) : middle;
        size_t a = start, b = middle, out = start;
        while (a < middle && b < end)
            destination[out++] = target_after(&source[a], &source[b]) ? source[b++] : source[a++];
        memcpy(destination + out, source + a, (middle - a) * sizeof(*source));
        memcpy(destination + out + (middle - a), source + b, (end - b) * sizeof(*source));
    }
    return runs;
}

/* A merge sort that takes what is sorted already as it is: views are, and lists are nearly. */
static bool sort_targets(struct nsn_routes *routes, struct nsn_target *targets, size_t count)
{
    if (!count || run_length(targets, count) == count)
        return true;
    size_t size = routes->sorting_capacity;
    if (!nsn_reserve(&routes->bytes, (void **)&routes->sorting, &size, count * sizeof(*targets)))
        return false;
    routes->sorting_capacity = size;
    struct nsn_target *source = targets, *destination = routes->sorting;
    for (size_t runs = 2; runs > 1;) {
        runs = merge_runs(source, destination, count);
        struct nsn_target *swap = source;
        source = destination;
        destination = swap;
    }
    if (source != targets)
        memcpy(targets, source, count * sizeof(*targets));
    return true;
}

static struct nsn_target *block_targets(struct block *block, size_t queues)
{
    return (struct nsn_target *)(void *)&block->queues[queues];
}

static size_t block_size(size_t queues, size_t targets)
{
    return sizeof(struct block) + queues * sizeof(struct nsn_route_queue) + targets * sizeof(struct nsn_target);
}

static void fill_group(const struct group *group, struct nsn_target *targets)
{
    for (const struct subscription *subscription = group->first; subscription; subscription = subscription->next)
        *targets++ = subscription->entry.target;
}

static void fill_view(struct block *view, const struct node *node, uint32_t queue_count)
{
    struct nsn_target *next = block_targets(view, queue_count);
    struct nsn_route_queue *queue = view->queues;
    view->route.queues = view->queues;
    view->route.queue_count = queue_count;
    for (const struct group *group = node->groups; group; group = group->next) {
        fill_group(group, next);
        if (group->queue) {
            *queue++ = (struct nsn_route_queue){group->queue->bytes, group->queue->length, group->count, next};
        } else {
            view->route.plain = next;
            view->route.plain_count = group->count;
        }
        next += group->count;
    }
}

/* What hangs at one node, as a route. NULL: no memory. */
static const struct nsn_route *view_of(struct nsn_routes *routes, struct node *node)
{
    if (node->view)
        return &node->view->route;
    uint32_t queues = 0;
    size_t targets = 0;
    for (const struct group *group = node->groups; group; group = group->next) {
        queues += group->queue != NULL;
        targets += group->count;
    }
    size_t size = block_size(queues, targets);
    struct block *view = nsn_take(&routes->bytes, size);
    if (!view)
        return NULL;
    fill_view(view, node, queues);
    if (!sort_targets(routes, (struct nsn_target *)view->route.plain, view->route.plain_count)) {
        nsn_give(&routes->bytes, view, size);
        return NULL;
    }
    node->view = view;
    node->view_size = size;
    return &view->route;
}

static struct queue_name *queue_of(const struct nsn_route_queue *queue)
{
    return nsn_container_of(queue->name, struct queue_name, bytes);
}

struct sizes {
    size_t plain, members;
    uint32_t queues;
};

/* Counts what the matched nodes hold together, and numbers their queue names. */
static bool merge_sizes(struct nsn_routes *routes, struct sizes *sizes)
{
    *sizes = (struct sizes){0};
    routes->merges++;
    for (size_t i = 0; i < routes->matched_count; i++) {
        const struct nsn_route *view = view_of(routes, routes->matched[i]);
        if (!view)
            return false;
        sizes->plain += view->plain_count;
        for (uint32_t q = 0; q < view->queue_count; q++) {
            struct queue_name *name = queue_of(&view->queues[q]);
            if (name->merge != routes->merges) {
                name->merge = routes->merges;
                name->index = sizes->queues++;
                name->members = 0;
            }
            name->members += view->queues[q].count;
            sizes->members += view->queues[q].count;
        }
    }
    return true;
}

static void merge_queue(struct block *merged, const struct nsn_route_queue *from, struct nsn_target **next)
{
    struct queue_name *name = queue_of(from);
    struct nsn_route_queue *queue = &merged->queues[name->index];
    if (!queue->name) {
        *queue = (struct nsn_route_queue){from->name, from->name_length, 0, *next};
        *next += name->members;
    }
    memcpy((struct nsn_target *)queue->members + queue->count, from->members, from->count * sizeof(*from->members));
    queue->count += from->count;
}

/* The matched nodes' views as one route, in a block that has room for it. */
static bool merge_into(struct nsn_routes *routes, struct block *merged, const struct sizes *sizes)
{
    struct nsn_target *plain = block_targets(merged, sizes->queues), *next = plain + sizes->plain, *at = plain;
    memset(merged->queues, 0, sizes->queues * sizeof(*merged->queues));
    for (size_t i = 0; i < routes->matched_count; i++) {
        const struct nsn_route *view = &routes->matched[i]->view->route;
        if (view->plain_count)
            memcpy(at, view->plain, view->plain_count * sizeof(*at));
        at += view->plain_count;
        for (uint32_t q = 0; q < view->queue_count; q++)
            merge_queue(merged, &view->queues[q], &next);
    }
    merged->route = (struct nsn_route){(uint32_t)sizes->plain, plain, sizes->queues, merged->queues};
    return sort_targets(routes, plain, sizes->plain);
}

/* --- lookup ------------------------------------------------------------------------------------------------------- */

/* Number of tokens; 0 when the subject matches nobody. */
static uint32_t split(struct nsn_routes *routes, const char *subject, size_t length)
{
    uint32_t count = 0, start = 0;
    if (length > NSN_SUBJECT_MAX)
        return 0;
    for (uint32_t i = 0; i <= length; i++) {
        if (i < length && subject[i] != '.')
            continue;
        if (i == start)
            return 0;
        routes->tokens[count++] = (struct token){start, i - start, 0};
        start = i + 1;
    }
    return count;
}

static bool match(struct nsn_routes *routes, struct node *node)
{
    if (routes->matched_count == routes->matched_capacity) {
        size_t old = routes->matched_capacity, wanted = old ? old * 2 : 16;
        struct node **matched = realloc(routes->matched, wanted * sizeof(*matched));
        if (!matched)
            return false;
        routes->bytes += (wanted - old) * sizeof(*matched);
        routes->matched = matched;
        routes->matched_capacity = wanted;
    }
    routes->matched[routes->matched_count++] = node;
    return true;
}

static struct node *literal_child(struct nsn_routes *routes, const struct node *node, const char *subject, uint32_t depth)
{
    struct token *token = &routes->tokens[depth];
    if (!token->hash)
        token->hash = nsn_hash(subject + token->start, token->length, routes->seed);
    return find_literal(routes, node, subject + token->start, token->length, token->hash);
}

/* Collects the nodes whose patterns match the subject that was split. */
static bool walk(struct nsn_routes *routes, const char *subject)
{
    size_t left = 0;
    routes->matched_count = 0;
    routes->steps[left++] = (struct step){routes->root, 0};
    while (left) {
        struct step step = routes->steps[--left];
        if (step.depth == routes->token_count) {
            if (step.node->groups && !match(routes, step.node))
                return false;
            continue;
        }
        if (step.node->tail && !match(routes, step.node->tail))
            return false;
        if (step.node->star)
            routes->steps[left++] = (struct step){step.node->star, step.depth + 1};
        struct node *child = step.node->literal_children ? literal_child(routes, step.node, subject, step.depth) : NULL;
        if (child)
            routes->steps[left++] = (struct step){child, step.depth + 1};
    }
    return true;
}

static const struct nsn_route *merge_scratch(struct nsn_routes *routes, const struct sizes *sizes)
{
    size_t wanted = block_size(sizes->queues, sizes->plain + sizes->members);
    if (!nsn_reserve(&routes->bytes, (void **)&routes->scratch, &routes->scratch_size, wanted))
        return NULL;
    return merge_into(routes, routes->scratch, sizes) ? &routes->scratch->route : NULL;
}

static const struct nsn_route *merge(struct nsn_routes *routes, const char *subject, size_t length, uint64_t hash)
{
    struct sizes sizes;
    if (!merge_sizes(routes, &sizes))
        return NULL;
    size_t size = block_size(sizes.queues, sizes.plain + sizes.members);
    if (!nsn_cache_admit(&routes->cache, length, hash, size))
        return merge_scratch(routes, &sizes);
    struct block *merged = nsn_take(&routes->cache.bytes, size);
    if (!merged)
        return NULL;
    if (merge_into(routes, merged, &sizes) &&
        nsn_cache_put(&routes->cache, subject, length, hash, &merged->route, merged, size))
        return &merged->route;
    nsn_give(&routes->cache.bytes, merged, size);
    return NULL;
}

static __attribute__((noinline)) const struct nsn_route *resolve(struct nsn_routes *routes, const char *subject, size_t length,
                                                                 uint64_t hash)
{
    routes->token_count = split(routes, subject, length);
    if (!routes->token_count)
        return &nobody;
    if (!walk(routes, subject))
        return NULL;
    if (routes->matched_count > 1)
        return merge(routes, subject, length, hash);
    const struct nsn_route *route = routes->matched_count ? view_of(routes, routes->matched[0]) : &nobody;
    if (route && nsn_cache_admit(&routes->cache, length, hash, 0))
        nsn_cache_put(&routes->cache, subject, length, hash, route, NULL, 0); /* right without memory for it, only slower */
    return route;
}

const struct nsn_route *nsn_routes_lookup(struct nsn_routes *routes, const char *subject, size_t length)
{
    uint64_t hash = nsn_hash(subject, length, routes->seed);
    struct nsn_cached *cached = nsn_cache_find(&routes->cache, subject, length, hash);
    if (!cached)
        return resolve(routes, subject, length, hash);
    if (!cached->referenced)
        cached->referenced = 1;
    return cached->route;
}

/* --- changes ------------------------------------------------------------------------------------------------------ */

int nsn_routes_add(struct nsn_routes *routes, struct nsn_target target, const char *pattern, size_t pattern_length,
                   const char *queue, size_t queue_length)
{
    if (pattern_length > NSN_SUBJECT_MAX || queue_length > NSN_SUBJECT_MAX || !nsn_pattern_valid(pattern, pattern_length))
        return -EINVAL;
    if (nsn_targets_find(&routes->targets, target))
        return -EEXIST;
    struct node *node = node_for(routes, pattern, pattern_length);
    if (!node)
        return -ENOMEM;
    struct group *group = group_for(routes, node, queue, queue_length);
    struct subscription *subscription = group ? nsn_take(&routes->bytes, sizeof(*subscription)) : NULL;
    if (!subscription || nsn_targets_add(&routes->targets, &subscription->entry, target)) {
        nsn_give(&routes->bytes, subscription, sizeof(*subscription));
        if (group)
            group_release(routes, group);
        prune(routes, node);
        return -ENOMEM;
    }
    group_append(group, subscription);
    changed(routes, node, pattern, pattern_length);
    return 0;
}

static void remove_subscription(struct nsn_routes *routes, struct subscription *subscription)
{
    struct group *group = subscription->group;
    struct node *node = group->node;
    const char *pattern;
    size_t length = pattern_of(routes, node, &pattern);
    changed(routes, node, pattern, length);
    group_remove(group, subscription);
    group_release(routes, group);
    prune(routes, node);
    nsn_targets_remove(&routes->targets, &subscription->entry);
    nsn_give(&routes->bytes, subscription, sizeof(*subscription));
}

int nsn_routes_remove(struct nsn_routes *routes, struct nsn_target target)
{
    struct nsn_targets_entry *entry = nsn_targets_find(&routes->targets, target);
    if (!entry)
        return -ENOENT;
    struct subscription *subscription = nsn_container_of(entry, struct subscription, entry);
    if (routes->parting && subscription->group->queue)
        routes->parting(routes->parting_context, target.slot, target.generation, &target.sid);
    remove_subscription(routes, subscription);
    return 0;
}

size_t nsn_routes_remove_session(struct nsn_routes *routes, uint32_t slot, uint32_t generation)
{
    struct nsn_targets_session *session = nsn_targets_session(&routes->targets, slot, generation);
    size_t count = session ? session->count : 0;
    if (count && routes->parting)
        routes->parting(routes->parting_context, slot, generation, NULL);
    if (count >= CLEAR_INSTEAD)
        nsn_cache_clear(&routes->cache);
    for (size_t i = 0; i < count; i++) /* the session ends with its last one */
        remove_subscription(routes, nsn_container_of(session->first, struct subscription, entry));
    return count;
}

void nsn_routes_on_parting(struct nsn_routes *routes, nsn_routes_parting parting, void *context)
{
    routes->parting = parting;
    routes->parting_context = context;
}

int nsn_routes_queue_of(const struct nsn_routes *routes, struct nsn_target target, const char **name, size_t *length)
{
    const struct nsn_targets_entry *entry = nsn_targets_find(&routes->targets, target);
    const struct queue_name *queue = entry ? nsn_container_of(entry, const struct subscription, entry)->group->queue : NULL;
    if (!queue)
        return 0;
    *name = queue->bytes;
    *length = queue->length;
    return 1;
}

void nsn_routes_clear(struct nsn_routes *routes)
{
    if (routes->parting)
        routes->parting(routes->parting_context, UINT32_MAX, 0, NULL);
    nsn_cache_clear(&routes->cache);
    size_t bucket = 0;
    for (struct nsn_targets_entry *entry; (entry = nsn_targets_any(&routes->targets, &bucket));)
        remove_subscription(routes, nsn_container_of(entry, struct subscription, entry));
}

/* --- life --------------------------------------------------------------------------------------------------------- */

struct nsn_routes *nsn_routes_new(size_t cache_entries)
{
    struct nsn_routes *routes = calloc(1, sizeof(*routes));
    if (!routes)
        return NULL;
    routes->bytes = sizeof(*routes);
    routes->seed = nsn_mix(nsn_now_ns(), (uintptr_t)routes | 1);
    bool complete = nsn_cache_init(&routes->cache, cache_entries ? cache_entries : CACHE_ENTRIES_DEFAULT);
    complete &= nsn_table_init(&routes->nodes) == 0;
    complete &= nsn_table_init(&routes->groups) == 0;
    complete &= nsn_table_init(&routes->queue_names) == 0;
    complete &= nsn_targets_init(&routes->targets) == 0;
    routes->root = nsn_take(&routes->bytes, sizeof(*routes->root));
    if (complete && routes->root)
        return routes;
    nsn_routes_free(routes);
    return NULL;
}

void nsn_routes_free(struct nsn_routes *routes)
{
    if (!routes)
        return;
    routes->parting = NULL;
    if (routes->root && routes->targets.sessions.buckets && routes->cache.index)
        nsn_routes_clear(routes);
    nsn_table_free(&routes->nodes);
    nsn_table_free(&routes->groups);
    nsn_table_free(&routes->queue_names);
    nsn_targets_free(&routes->targets);
    nsn_cache_free(&routes->cache);
    free(routes->root);
    free(routes->matched);
    free(routes->scratch);
    free(routes->sorting);
    free(routes);
}

size_t nsn_routes_count(const struct nsn_routes *routes) { return routes->targets.entries.count; }

size_t nsn_routes_cached(const struct nsn_routes *routes) { return nsn_cache_count(&routes->cache); }

size_t nsn_routes_bytes(const struct nsn_routes *routes)
{
    return routes->bytes + routes->cache.bytes + nsn_table_bytes(&routes->nodes) + nsn_table_bytes(&routes->groups) +
           nsn_table_bytes(&routes->queue_names) + nsn_targets_bytes(&routes->targets);
}
