/* A stream with a source and a sink, made and destroyed by numbers and steps as INSANE's own programs do it. */
#include <nsn/nsn.h>
#include <stdio.h>

int main(void)
{
    int result = 1;
    if (nsn_init() < 0) {
        printf("no session\n");
        return 1;
    }
    nsn_options_t options = {.datapath = NSN_QOS_DATAPATH_FAST, .consumption = NSN_QOS_CONSUMPTION_POLL,
                             .determinism = NSN_QOS_DETERMINISM_TIMESENSITIVE, .reliability = NSN_QOS_RELIABILITY_UNRELIABLE};
    nsn_stream_t stream = nsn_create_stream(options);
    if (stream == NSN_INVALID_STREAM_HANDLE)
        goto close;
    nsn_source_t source = nsn_create_source(stream, 0);
    if (source == NSN_INVALID_SRC)
        goto destroy_stream;
    nsn_sink_t sink = nsn_create_sink(stream, 0, NULL);
    if (sink == NSN_INVALID_SNK)
        goto destroy_source;
    nsn_buffer_t *buffer = nsn_get_buffer(32, 0);
    if (nsn_buffer_is_valid(buffer) && nsn_release_data(buffer) >= 0 && nsn_data_available(sink, NSN_NONBLOCKING) == 0)
        result = 0;
    nsn_destroy_sink(sink);
destroy_source:
    nsn_destroy_source(source);
destroy_stream:
    nsn_destroy_stream(stream);
close:
    nsn_close();
    printf(result ? "failed\n" : "all made and destroyed\n");
    return result;
}
