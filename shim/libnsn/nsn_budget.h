/* How much memory a session may touch when nobody has said: the default, or less where the process has a memory limit.
 *
 * At the limit of a memory cgroup the kernel does not refuse, it kills whoever touches the next page. So a session's default
 * budget is a quarter of the tightest limit that holds for the process: the rest is for the program itself, for a few more
 * sessions, and for what the others in the group touch. */
#ifndef NSN_BUDGET_H
#define NSN_BUDGET_H

#include <stddef.h>
#include <stdint.h>

#define NSN_BUDGET_DEFAULT (256ull << 20)
#define NSN_BUDGET_LEAST (1ull << 20)          /* however tight the limit is */
#define NSN_BUDGET_SHARE 4u                    /* one part in so many of the limit */
#define NSN_BUDGET_FRESH_NS 1000000000ull      /* a limit that was read is good for so long */
#define NSN_BUDGET_ENVIRONMENT "INSANE_NATS_BUDGET" /* bytes, or with K, M or G behind; wins over any limit */

/* The tightest memory limit of this process's cgroups, bytes: memory.max and memory.high (version 2) or
 * memory.limit_in_bytes (version 1), from the process's own group up to the highest one that can be seen. UINT64_MAX: none.
 * root: "", or where a test has put its proc and sys. */
uint64_t nsn_memory_limit(const char *root);
/* Bytes for a session that has no budget of its own. -EINVAL and words when the environment's value is none. */
int nsn_budget_default(uint64_t *budget, char *error, size_t error_size);

#endif
