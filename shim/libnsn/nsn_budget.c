/* Memory limits of cgroups, and the budget that comes of them. */
#include "nsn_budget.h"

#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nsn_error.h"
#include "nsn_shared.h"

/* A hierarchy of cgroups that limits memory. */
struct hierarchy {
    bool second;                   /* version 2 */
    char group[PATH_MAX];          /* the process's, as seen from the hierarchy's root */
    char mount_root[PATH_MAX];     /* the group that is seen at the mount point */
    char mount_point[PATH_MAX];
};

static bool has_word(const char *list, const char *word)
{
    size_t length = strlen(word);
    for (const char *at = list; *at; at += strcspn(at, ","), at += *at == ',')
        if (strncmp(at, word, length) == 0 && (at[length] == ',' || at[length] == 0))
            return true;
    return false;
}

/* /proc/self/cgroup: "NUMBER:CONTROLLERS:GROUP", a line each hierarchy; version 2 has number 0 and no controllers. */
static bool find_group(const char *root, struct hierarchy *found)
{
    char path[PATH_MAX], line[2 * PATH_MAX];
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    FILE *file = fopen(path, "re");
    bool there = false;
    while (file && fgets(line, sizeof line, file)) {
        line[strcspn(line, "\n")] = 0;
        char *controllers = strchr(line, ':'), *group = controllers ? strchr(controllers + 1, ':') : NULL;
        if (!group)
            continue;
        *group = 0;
        if (has_word(controllers + 1, "memory") == !found->second && (!found->second || strncmp(line, "0:", 2) == 0)) {
            there = snprintf(found->group, sizeof found->group, "%s", group + 1) < (int)sizeof found->group;
            break;
        }
    }
    if (file)
        fclose(file);
    return there;
}

/* /proc/self/mountinfo: ID PARENT DEVICE ROOT POINT OPTIONS … - TYPE SOURCE OPTIONS. */
static bool find_mount(const char *root, struct hierarchy *found)
{
    char path[PATH_MAX], line[3 * PATH_MAX], type[32], options[256];
    snprintf(path, sizeof path, "%s/proc/self/mountinfo", root);
    FILE *file = fopen(path, "re");
    bool there = false;
    while (!there && file && fgets(line, sizeof line, file)) {
        const char *rest = strstr(line, " - ");
        if (!rest || sscanf(line, "%*s %*s %*s %4095s %4095s", found->mount_root, found->mount_point) != 2 ||
            sscanf(rest, " - %31s %*s %255s", type, options) != 2)
            continue;
        there = found->second ? strcmp(type, "cgroup2") == 0 : strcmp(type, "cgroup") == 0 && has_word(options, "memory");
    }
    if (file)
        fclose(file);
    return there;
}

static uint64_t limit_in(const char *root, const char *directory, const char *name)
{
    char path[3 * PATH_MAX];
    unsigned long long limit;
    snprintf(path, sizeof path, "%s%s/%s", root, directory, name);
    FILE *file = fopen(path, "re");
    bool given = file && fscanf(file, "%llu", &limit) == 1; /* "max" is none */
    if (file)
        fclose(file);
    return given && limit < (uint64_t)INT64_MAX / 2 ? limit : UINT64_MAX; /* version 1 has a number that means none */
}

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t tightest(const char *root, bool second)
{
    struct hierarchy found = {.second = second};
    if (!find_group(root, &found) || !find_mount(root, &found))
        return UINT64_MAX;
    /* What is mounted may be a group below the root: in a container often the container's own. */
    size_t prefix = strcmp(found.mount_root, "/") == 0 ? 0 : strlen(found.mount_root);
    bool below = strncmp(found.group, found.mount_root, prefix) == 0 &&
                 (found.group[prefix] == '/' || found.group[prefix] == 0);
    const char *group = below ? found.group + prefix : "";
    char directory[2 * PATH_MAX];
    uint64_t limit = UINT64_MAX;
    int top = snprintf(directory, sizeof directory, "%s", found.mount_point);
    snprintf(directory + top, sizeof directory - (size_t)top, "%s", strcmp(group, "/") == 0 ? "" : group);
    for (;;) {
        if (second)
            limit = least(limit, least(limit_in(root, directory, "memory.max"), limit_in(root, directory, "memory.high")));
        else
            limit = least(limit, limit_in(root, directory, "memory.limit_in_bytes"));
        char *last = strrchr(directory, '/');
        if (!last || last < directory + top)
            return limit;
        *last = 0;
    }
}

uint64_t nsn_memory_limit(const char *root) { return least(tightest(root, false), tightest(root, true)); }

/* Of this process, as of a moment ago: reading takes longer than all else that opens a session does. */
static uint64_t limit_of_late(void)
{
    static uint64_t limit, read_at; /* ns; 0: never */
    uint64_t now = nsn_now_ns(), at = nsn_load_acquire(&read_at);
    if (!at || now - at > NSN_BUDGET_FRESH_NS) {
        nsn_store_relaxed(&limit, nsn_memory_limit(""));
        nsn_store_release(&read_at, now); /* pairs with the acquire above: whoever sees it sees the limit */
    }
    return nsn_load_relaxed(&limit);
}

static int parse(const char *word, uint64_t *bytes)
{
    char *end;
    errno = 0;
    unsigned long long number = strtoull(word, &end, 10);
    const char *units = "KMG", *unit = *end ? strchr(units, *end) : NULL;
    unsigned shift = unit ? 10u * (unsigned)(unit - units + 1) : 0;
    if (errno || *word < '0' || *word > '9' || (*end && (!unit || end[1])) || number > UINT64_MAX >> 1 >> shift || !number)
        return -EINVAL;
    *bytes = (uint64_t)number << shift;
    return 0;
}

int nsn_budget_default(uint64_t *budget, char *error, size_t error_size)
{
    const char *word = getenv(NSN_BUDGET_ENVIRONMENT);
    if (word && *word) {
        if (parse(word, budget) == 0)
            return 0;
        return nsn_explain(error, error_size, -EINVAL, NSN_BUDGET_ENVIRONMENT " cannot be \"%s\": it is a number of bytes, or "
                           "one with K, M or G behind it", word);
    }
    uint64_t share = limit_of_late() / NSN_BUDGET_SHARE;
    *budget = share < NSN_BUDGET_LEAST ? NSN_BUDGET_LEAST : least(share, NSN_BUDGET_DEFAULT);
    return 0;
}
