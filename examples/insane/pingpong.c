/* Ping-pong over INSANE's primitives: start `pingpong pong`, then `pingpong ping [ROUNDS]`, in any order, in a directory
 * with an nsn-app.cfg. Ping prints the median round trip.
 *
 *     gcc pingpong.c -o pingpong $(insane-nats config --cflags --libs)
 */
#include <nsn/nsn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CHANNEL 7
#define SIZE 64

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return left < right ? -1 : left > right;
}

/* Echoes what it consumes, as it is: the buffer goes from one end to the other. An empty message ends it. */
static int pong(nsn_source_t source, nsn_sink_t sink)
{
    for (int ended = 0; !ended;) {
        nsn_buffer_t *buffer = nsn_consume_data(sink, NSN_BLOCKING);
        if (!nsn_buffer_is_valid(buffer)) {
            fprintf(stderr, "pong: %s\n", nsn_error_text());
            return 1;
        }
        ended = buffer->len == 0;
        if (nsn_emit_data(source, buffer) < 0) {
            fprintf(stderr, "pong: %s\n", nsn_error_text());
            return 1;
        }
    }
    return 0;
}

/* Emits until somebody listens: pong may start later. */
static int emit(nsn_source_t source, size_t length)
{
    for (;;) {
        nsn_buffer_t *buffer = nsn_get_buffer(SIZE, NSN_BLOCKING);
        if (!nsn_buffer_is_valid(buffer))
            return -1;
        memset(buffer->data, 'x', SIZE);
        buffer->len = length;
        int token = nsn_emit_data(source, buffer);
        if (token < 0)
            return -1;
        if (nsn_check_emit_outcome(source, token) > 0)
            return 0;
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

static int ping(nsn_source_t source, nsn_sink_t sink, int rounds)
{
    uint64_t *times = calloc((size_t)rounds, sizeof *times);
    for (int i = 0; times && i <= rounds; i++) {
        uint64_t begin = now_ns();
        if (emit(source, i < rounds ? SIZE : 0) < 0) {
            fprintf(stderr, "ping: %s\n", nsn_error_text());
            return 1;
        }
        nsn_buffer_t *buffer = nsn_consume_data(sink, NSN_BLOCKING);
        if (!nsn_buffer_is_valid(buffer)) {
            fprintf(stderr, "ping: %s\n", nsn_error_text());
            return 1;
        }
        if (i < rounds)
            times[i] = now_ns() - begin;
        nsn_release_data(buffer);
    }
    qsort(times, (size_t)rounds, sizeof *times, by_value);
    printf("%d round trips of %d bytes, median %.2f us\n", rounds, SIZE, (double)times[rounds / 2] / 1e3);
    free(times);
    return 0;
}

int main(int count, char **words)
{
    int rounds = count > 2 ? atoi(words[2]) : 10000;
    if (count < 2 || rounds < 1 || (strcmp(words[1], "ping") != 0 && strcmp(words[1], "pong") != 0)) {
        fprintf(stderr, "usage: pingpong ping [ROUNDS] | pingpong pong\n");
        return 2;
    }
    if (nsn_init() < 0)
        return 1;
    nsn_options_t options = {NSN_QOS_DATAPATH_DEFAULT, NSN_QOS_CONSUMPTION_POLL, NSN_QOS_DETERMINISM_DEFAULT,
                             NSN_QOS_RELIABILITY_RELIABLE};
    nsn_stream_t stream = nsn_create_stream(options);
    nsn_sink_t sink = nsn_create_sink(stream, CHANNEL, NULL);
    nsn_source_t source = nsn_create_source(stream, CHANNEL);
    int failed = 1;
    if (sink != NSN_INVALID_SNK && source != NSN_INVALID_SRC)
        failed = strcmp(words[1], "ping") == 0 ? ping(source, sink, rounds) : pong(source, sink);
    nsn_close();
    return failed;
}
