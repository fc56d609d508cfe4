/* What routing costs: cached lookups, misses, changes of interest, and nsnd's log. Prints ns of processor time, the
 * best of several rounds. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "nsn_log.h"
#include "nsn_protocol.h"
#include "nsn_route.h"

#define ROUNDS 5

static struct nsn_routes *routes;
static struct nsn_log_writer *writer;
static struct nsn_log_reader reader;
static char subjects[300000][24];
static uint64_t sink; /* keeps what was looked up from being optimised away */

static uint64_t cpu_ns(void)
{
    struct timespec spent;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
    return (uint64_t)spent.tv_sec * 1000000000u + (uint64_t)spent.tv_nsec;
}

static void must(int result, const char *what)
{
    if (result >= 0)
        return;
    fprintf(stderr, "%s: %s\n", what, strerror(-result));
    exit(1);
}

static void report(const char *name, double ns) { printf("%-72s %9.1f ns\n", name, ns); }

static void subscribe(uint32_t slot, uint32_t sid, const char *pattern)
{
    must(nsn_routes_add(routes, (struct nsn_target){slot, 1, sid}, pattern, strlen(pattern), NULL, 0), pattern);
}

static double best(void (*run)(uint64_t count), uint64_t count)
{
    double lowest = 1e18;
    for (int i = 0; i < ROUNDS; i++) {
        uint64_t start = cpu_ns();
        run(count);
        double ns = (double)(cpu_ns() - start) / (double)count;
        lowest = ns < lowest ? ns : lowest;
    }
    return lowest;
}

static void look_up_one(uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        sink += nsn_routes_lookup(routes, "sensors.room12.tempr", 20)->plain_count;
}

static void look_up_one_behind_the_log(uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        if (nsn_log_reader_behind(&reader))
            must(nsn_log_reader_replay(&reader, routes, NULL, 0), "replay");
        sink += nsn_routes_lookup(routes, "sensors.room12.tempr", 20)->plain_count;
    }
}

static void look_up_thousand(uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        sink += nsn_routes_lookup(routes, subjects[i % 1000], strlen(subjects[0]))->plain_count;
}

static void look_up_all(uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        sink += nsn_routes_lookup(routes, subjects[i % 300000], 20)->plain_count;
}

static void change_literal(uint64_t count)
{
    for (uint64_t i = 0; i < count; i += 2) {
        subscribe(99, 1, subjects[i % 4000]);
        nsn_routes_remove(routes, (struct nsn_target){99, 1, 1});
    }
}

static void change_wildcard(uint64_t count)
{
    for (uint64_t i = 0; i < count; i += 2) {
        subscribe(99, 1, "_INBOX.abcdefghijklmnopqrstuv.*");
        nsn_routes_remove(routes, (struct nsn_target){99, 1, 1});
    }
}

static uint8_t batch[32768];
static uint32_t batch_length;

static void fill_batch(uint8_t op, uint32_t first)
{
    char pattern[40];
    batch_length = 0;
    for (uint32_t i = 0; i < 100; i++) {
        int length = snprintf(pattern, sizeof(pattern), "orders.eu.%06u.created", first + i);
        struct nsn_interest_change change = {op, 0, op == NSN_INTEREST_ADD ? (uint16_t)length : 0, 0, 0, first + i, 0};
        memcpy(batch + batch_length, &change, sizeof(change));
        memcpy(batch + batch_length + sizeof(change), pattern, change.pattern_length);
        batch_length += (uint32_t)((sizeof(change) + change.pattern_length + 7) & ~7u);
    }
}

static double apply_batches(uint8_t op)
{
    uint64_t spent = 0;
    for (uint32_t first = 0; first < 10000; first += 100) {
        uint32_t failed;
        fill_batch(op, first);
        uint64_t start = cpu_ns();
        must(nsn_log_writer_apply(writer, 1, 1, batch, batch_length, 100, &failed), "apply");
        spent += cpu_ns() - start;
    }
    return (double)spent / 10000;
}

static void lookups(void)
{
    routes = nsn_routes_new(0);
    subscribe(1, 1, "sensors.*.tempr");
    report("cached lookup, 20-byte subject, 1 subscription", best(look_up_one, 5000000));
    for (uint32_t i = 0; i < 10000; i++)
        subscribe(i % 100 + 2, i, subjects[i % 1000]);
    report("cached lookup, 20-byte subject, 10,000 other subscriptions", best(look_up_one, 5000000));
    report("cached lookup, 1,000 subjects in turn, 10 subscriptions each", best(look_up_thousand, 5000000));
    nsn_routes_free(routes);
}

static void misses(void)
{
    routes = nsn_routes_new(0);
    subscribe(1, 1, "many.>");
    report("lookup, 300,000 subjects in turn, one wildcard subscription", best(look_up_all, 600000));
    subscribe(2, 1, "many.*.*");
    report("lookup, 300,000 subjects in turn, two wildcard subscriptions", best(look_up_all, 600000));
    printf("%-72s %9.1f KiB\n", "memory then", (double)nsn_routes_bytes(routes) / 1024);
    report("add or remove a literal subscription, full cache", best(change_literal, 100000));
    report("add or remove a wildcard subscription, full cache", best(change_wildcard, 100000));
    nsn_routes_free(routes);
}

static void logs(void)
{
    char directory[] = "/dev/shm/insane_nats-bench-XXXXXX", error[256] = "", command[64];
    uint64_t head = 0;
    if (!mkdtemp(directory))
        must(-errno, directory);
    must(nsn_log_writer_open(&writer, directory, &head, 0, error, sizeof(error)), error);
    must(nsn_log_reader_open(&reader, directory, &head, error, sizeof(error)), error);
    routes = nsn_routes_new(0);
    double add = 1e18, take_out = 1e18, replay = 1e18;
    for (int i = 0; i < ROUNDS; i++) {
        double ns = apply_batches(NSN_INTEREST_ADD);
        add = ns < add ? ns : add;
        uint64_t start = cpu_ns();
        must(nsn_log_reader_replay(&reader, routes, error, sizeof(error)), error);
        ns = (double)(cpu_ns() - start) / 10000;
        replay = ns < replay ? ns : replay;
        ns = apply_batches(NSN_INTEREST_REMOVE);
        take_out = ns < take_out ? ns : take_out;
        must(nsn_log_reader_replay(&reader, routes, error, sizeof(error)), error);
    }
    report("log writer, a subscription added, in batches of 100", add);
    report("log writer, a subscription removed, in batches of 100", take_out);
    report("log reader, a subscription applied to the routes", replay);
    subscribe(1, 1, "sensors.*.tempr");
    report("log looked at and cached lookup", best(look_up_one_behind_the_log, 5000000));
    nsn_routes_free(routes);
    nsn_log_reader_close(&reader);
    nsn_log_writer_close(writer);
    snprintf(command, sizeof(command), "rm -r %s", directory);
    if (system(command))
        exit(1);
}

int main(void)
{
    for (uint32_t i = 0; i < 300000; i++)
        snprintf(subjects[i], sizeof(subjects[i]), "many.%06u.temperat", i);
    lookups();
    misses();
    logs();
    return sink == 0;
}
