/* One way: `oneway sink CHANNEL COUNT` counts what `oneway source CHANNEL COUNT` sends it, each message numbered. */
#include <nsn/nsn.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct sample {
    uint64_t number;
    char text[56];
};

static void source(nsn_stream_t stream, uint32_t channel, uint64_t count)
{
    nsn_source_t out = nsn_create_source(stream, channel);
    int reached = 0;
    for (uint64_t number = 0; number < count;) {
        nsn_buffer_t *buffer = nsn_get_buffer(sizeof(struct sample), NSN_BLOCKING);
        if (!nsn_buffer_is_valid(buffer))
            continue;
        struct sample *sample = (struct sample *)buffer->data;
        sample->number = number;
        strcpy(sample->text, "numbered");
        buffer->len = sizeof *sample;
        int id = nsn_emit_data(out, buffer);
        reached = id < 0 ? id : nsn_check_emit_outcome(out, id);
        if (number > 0 || reached > 0) /* the sink may not be there yet: the first is sent until it is */
            number++;
    }
    printf("sent %" PRIu64 ", the last to %d\n", count, reached);
    nsn_destroy_source(out);
}

static void sink(nsn_stream_t stream, uint32_t channel, uint64_t count)
{
    nsn_sink_t in = nsn_create_sink(stream, channel, NULL);
    uint64_t received = 0, out_of_order = 0;
    while (received < count) {
        nsn_buffer_t *buffer = nsn_consume_data(in, NSN_NONBLOCKING);
        if (!nsn_buffer_is_valid(buffer))
            continue;
        const struct sample *sample = (const struct sample *)buffer->data;
        out_of_order += sample->number != received || buffer->len != sizeof *sample || strcmp(sample->text, "numbered") != 0;
        received++;
        nsn_release_data(buffer);
    }
    printf("received %" PRIu64 ", %" PRIu64 " out of order\n", received, out_of_order);
    nsn_destroy_sink(in);
}

int main(int count, char **words)
{
    if (count != 4 || nsn_init() < 0)
        return 1;
    nsn_options_t options = {.consumption = NSN_QOS_CONSUMPTION_LOW, .reliability = NSN_QOS_RELIABILITY_RELIABLE};
    nsn_stream_t stream = nsn_create_stream(options);
    uint32_t channel = (uint32_t)strtoul(words[2], NULL, 10);
    uint64_t messages = strtoull(words[3], NULL, 10);
    if (strcmp(words[1], "sink") == 0)
        sink(stream, channel, messages);
    else
        source(stream, channel, messages);
    nsn_destroy_stream(stream);
    return nsn_close();
}
