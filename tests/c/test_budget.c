/* The default budget: what the memory limits of cgroups leave, and what somebody has said. */
#include "nsn_budget.h"

#include <errno.h>

#include "check.h"
#include "scratch.h"

#define MIB (1ull << 20)

static char words[200];

static void put(const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s%s", scratch, name);
    for (char *slash = strchr(path + strlen(scratch) + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0700);
        *slash = '/';
    }
    FILE *file = fopen(path, "w");
    CHECK(file);
    fputs(text, file);
    fclose(file);
}

TEST(without_cgroups_there_is_no_limit)
{
    scratch_make();
    CHECK(nsn_memory_limit(scratch) == UINT64_MAX);
}

TEST(the_tightest_limit_on_the_way_up_holds_in_version_2)
{
    scratch_make();
    put("/proc/self/cgroup", "0::/a/b\n");
    put("/proc/self/mountinfo", "31 24 0:27 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n");
    put("/sys/fs/cgroup/a/b/memory.max", "max\n");
    put("/sys/fs/cgroup/a/b/memory.high", "900000000\n");
    CHECK_EQUAL(nsn_memory_limit(scratch), 900000000);
    put("/sys/fs/cgroup/a/memory.max", "104857600\n");
    CHECK_EQUAL(nsn_memory_limit(scratch), 104857600);
    put("/sys/fs/cgroup/memory.max", "1000000\n");
    CHECK_EQUAL(nsn_memory_limit(scratch), 1000000);
}

TEST(version_1_is_found_by_its_controller)
{
    scratch_make();
    put("/proc/self/cgroup", "5:cpu,cpuacct:/x\n4:memory:/a\n0::/other\n");
    put("/proc/self/mountinfo",
        "30 24 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        "31 24 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
    put("/sys/fs/cgroup/memory/a/memory.limit_in_bytes", "67108864\n");
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
    CHECK_EQUAL(nsn_memory_limit(scratch), 64 * MIB);
}

TEST(in_a_container_the_mount_point_is_its_own_group)
{
    scratch_make();
    put("/proc/self/cgroup", "4:memory:/docker/1234\n");
    put("/proc/self/mountinfo", "31 24 0:27 /docker/1234 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n");
    put("/sys/fs/cgroup/memory/memory.limit_in_bytes", "67108864\n");
    CHECK_EQUAL(nsn_memory_limit(scratch), 64 * MIB);
    put("/proc/self/mountinfo", "31 24 0:27 /docker/12 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n");
    CHECK_EQUAL(nsn_memory_limit(scratch), 64 * MIB);
}

TEST(what_somebody_has_said_wins)
{
    uint64_t budget;
    const struct { const char *word; uint64_t bytes; } said[] = {
        {"1000", 1000}, {"64K", 64 << 10}, {"300M", 300 * MIB}, {"2G", 2048 * MIB}};
    for (size_t i = 0; i < sizeof said / sizeof said[0]; i++) {
        setenv(NSN_BUDGET_ENVIRONMENT, said[i].word, 1);
        CHECK_EQUAL(nsn_budget_default(&budget, words, sizeof words), 0);
        CHECK_EQUAL(budget, said[i].bytes);
    }
    const char *nonsense[] = {"0", "-1", "much", "1MB", "12X", " 1", "99999999999999999999", "99999999999G"};
    for (size_t i = 0; i < sizeof nonsense / sizeof nonsense[0]; i++) {
        setenv(NSN_BUDGET_ENVIRONMENT, nonsense[i], 1);
        CHECK_EQUAL(nsn_budget_default(&budget, words, sizeof words), -EINVAL);
        CHECK(strstr(words, nonsense[i]));
    }
    unsetenv(NSN_BUDGET_ENVIRONMENT);
    CHECK_EQUAL(nsn_budget_default(&budget, words, sizeof words), 0);
    CHECK(budget >= NSN_BUDGET_LEAST && budget <= NSN_BUDGET_DEFAULT);
    scratch_remove();
}

CHECK_MAIN()
