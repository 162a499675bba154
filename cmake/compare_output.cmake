# cmake -DPROGRAM=.. -DEXPECTED=.. -P compare_output.cmake: PROGRAM prints exactly the file EXPECTED.
execute_process(COMMAND "${PROGRAM}" OUTPUT_VARIABLE got COMMAND_ERROR_IS_FATAL ANY)
file(READ "${EXPECTED}" wanted)
if(NOT got STREQUAL wanted)
    message(FATAL_ERROR "${PROGRAM} printed\n${got}\nbut ${EXPECTED} has\n${wanted}")
endif()
