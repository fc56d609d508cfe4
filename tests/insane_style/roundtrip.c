/* Both ways on one channel: `roundtrip pong COUNT` emits each buffer that it consumes, `roundtrip ping COUNT` sends and
 * waits. */
#include <nsn/nsn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHANNEL 3

static int ping(nsn_source_t source, nsn_sink_t sink, int count)
{
    int good = 0, emitted = 0;
    while (good < count) {
        nsn_buffer_t *sent = nsn_get_buffer(sizeof good, 0);
        if (!nsn_buffer_is_valid(sent))
            return -1;
        memcpy(sent->data, &good, sizeof good);
        emitted = nsn_emit_data(source, sent);
        if (good == 0 && (emitted < 0 || nsn_check_emit_outcome(source, emitted) <= 0))
            continue; /* nobody listens yet */
        nsn_buffer_t *back = nsn_consume_data(sink, NSN_BLOCKING);
        if (!nsn_buffer_is_valid(back) || back->len != sizeof good || memcmp(back->data, &good, sizeof good) != 0)
            return -1;
        nsn_release_data(back);
        good++;
    }
    return good;
}

static int pong(nsn_source_t source, nsn_sink_t sink, int count)
{
    int forwarded = 0;
    while (forwarded < count) {
        nsn_buffer_t *buffer = nsn_consume_data(sink, NSN_BLOCKING);
        if (!nsn_buffer_is_valid(buffer))
            return -1;
        forwarded += nsn_emit_data(source, buffer) >= 0;
    }
    return forwarded;
}

int main(int count, char **words)
{
    if (count != 3 || nsn_init() < 0)
        return 1;
    nsn_options_t options = {.datapath = NSN_QOS_DATAPATH_FAST, .consumption = NSN_QOS_CONSUMPTION_POLL,
                             .reliability = NSN_QOS_RELIABILITY_RELIABLE};
    nsn_stream_t stream = nsn_create_stream(options);
    nsn_sink_t sink = nsn_create_sink(stream, CHANNEL, NULL);
    nsn_source_t source = nsn_create_source(stream, CHANNEL);
    int messages = atoi(words[2]);
    int done = strcmp(words[1], "ping") == 0 ? ping(source, sink, messages) : pong(source, sink, messages);
    printf("%s %d\n", words[1], done);
    nsn_destroy_sink(sink);
    nsn_destroy_source(source);
    nsn_destroy_stream(stream);
    nsn_close();
    return done != messages;
}
